//! A small run with all that a real one has, made by the command from text.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::{Dice, anello};

const CONFIG: &str = r#"
name = "small"
seed = 3
lanes = 4
stages = ["warmup", "stable", "ct-anneal", "longct", "mid-training"]

[model]
layers = 1
hidden = 32
heads = 4
ffn = 48
vocab = 2048

[compute]
threads = 1

[data]
tokenizer = "tokenizer.json"
prefetch_bytes = "64KiB"
sources.tales.url = "data/tales"
sources.lists.url = "data/lists"

[checkpoint]
every_steps = 3
keep_last = 3
part_bytes = "64KiB"

[stage.warmup]
tokens = 512
sequence = 16
batch = 128
micro_batch = 2
lr_curve = "linear"
lr_from = 0
lr_to = 3e-3
loops = 2
beta = 0.1
mixture = { tales = 3, lists = 1 }

[stage.stable]
tokens = 1792
sequence = 16
batch = 256
batch_ramp = { from = 128, over = 768 }
micro_batch = 2
lr = 3e-3
loops = 3
beta = 0.05
mixture = { tales = 3, lists = 1 }

[stage.ct-anneal]
tokens = 768
sequence = 32
batch = 128
lr_curve = "cosine"
lr_from = 1e-3
lr_to = 1e-4
loops = 3
rope_base = 40_000
mixture = { tales = 1 }
reset_optimizer = true

[stage.longct]
tokens = 1280
sequence = 64
batch = 256
lr_curve = "cosine"
lr_from = 1e-3
lr_to = 1e-4
loops = 2
rope_base = 1_000_000
mixture = { tales = 1, lists = 2 }
upcycle = { layers = 2 }

[stage.mid-training]
tokens = 768
sequence = 32
batch = 128
lr_curve = "wsd"
lr = 1e-3
lr_to = 1e-5
lr_decay = 0.5
loops = 3
rope_base = 1_000_000
mixture = { lists = 1 }
"#;

/// A folder with data, a config `small.toml`, and the undisturbed run in `undisturbed`.
#[derive(Debug)]
pub struct World {
    /// The folder.
    pub folder: PathBuf,
}

/// The world of this test process in `scratch/name`, made anew by the first that asks. It stays afterwards, to look at.
pub fn world(scratch: &str, name: &str) -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let folder = Path::new(scratch).join(name);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("cargo's scratch folder can be written");
        let world = World { folder };
        world.make_data();
        std::fs::write(world.folder.join("small.toml"), CONFIG).expect("the scratch folder can be written");
        world.anello(&["run", "small.toml", "--out", "undisturbed"]).expect(0);
        world
    })
}

impl World {
    /// Runs `anello ARGUMENTS` in the folder to its end.
    pub fn anello(&self, arguments: &[&str]) -> crate::Done {
        anello(&self.folder, arguments)
    }

    fn make_data(&self) {
        const WORDS: [&str; 24] = [
            "the", "ring", "of", "workers", "turns", "and", "every", "step", "leaves", "its", "mark", "on",
            "a", "loop", "that", "began", "before", "it", "while", "light", "falls", "through", "old",
            "glass",
        ];
        let mut dice = Dice(11);
        for (source, documents, separator) in [("tales", 150, " "), ("lists", 25, "\n- ")] {
            let lines = (0..documents).map(|_| {
                let words: Vec<&str> =
                    (0..8 + dice.below(40)).map(|_| WORDS[dice.below(WORDS.len() as u64) as usize]).collect();
                serde_json::json!({ "text": words.join(separator) }).to_string() + "\n"
            });
            let text: String = lines.collect();
            std::fs::write(self.folder.join(format!("{source}.jsonl")), text)
                .expect("the scratch folder can be written");
        }
        let train = ["data", "train-tokenizer", "tales.jsonl", "lists.jsonl", "--vocab", "400"];
        self.anello(&[&train[..], &["--out", "tokenizer.json"]].concat()).expect(0);
        for source in ["tales", "lists"] {
            let (text, out) = (format!("{source}.jsonl"), format!("data/{source}"));
            let tokenize = ["data", "tokenize", &text, "--tokenizer", "tokenizer.json", "--out", &out];
            self.anello(&[&tokenize[..], &["--row-group", "200"]].concat()).expect(0);
        }
    }

    /// Asserts that `run` keeps the same checkpoints as the undisturbed run.
    pub fn assert_same_checkpoints(&self, run: &str) {
        let list = |run: &str| self.anello(&["checkpoint", "list", run]).expect(0);
        assert_eq!(list(run), list("undisturbed"), "the checkpoints that are kept");
    }

    /// Asserts that `run` is complete and the same as the undisturbed one: every checkpoint, every metric.
    pub fn assert_undisturbed(&self, run: &str) {
        self.assert_alike(run, "undisturbed");
        for step in ["@4", "@20"] {
            let (ours, theirs) = (format!("{run}{step}"), format!("undisturbed{step}"));
            let told = self.anello(&["checkpoint", "diff", &theirs, &ours]).expect(0);
            assert!(told.contains("are equal: all"), "{told}");
        }
    }

    /// Asserts that `run` is complete and ended as `other` did, with the same metrics in every step.
    pub fn assert_alike(&self, run: &str, other: &str) {
        self.anello(&["checkpoint", "verify", run]).expect(0);
        let told = self.anello(&["checkpoint", "diff", other, run]).expect(0);
        assert!(told.contains("are equal: all"), "{told}");
        let metrics = |run: &str| without_seconds(&self.anello(&["metrics", run, "--csv"]).expect(0));
        let (ours, theirs) = (metrics(run), metrics(other));
        assert!(theirs.len() > 30, "{theirs:?}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs, "a row of the metrics");
        }
        assert_eq!(ours.len(), theirs.len(), "rows of the metrics");
    }
}

/// The rows of a metrics table without the columns that tell of time (`…_s`).
pub fn without_seconds(csv: &str) -> Vec<Vec<String>> {
    let header: Vec<&str> = csv.lines().next().unwrap_or_default().split(',').collect();
    let kept = |row: &str| -> Vec<String> {
        let cells = header.iter().zip(row.split(','));
        cells.filter(|(name, _)| !name.ends_with("_s")).map(|(_, cell)| cell.to_owned()).collect()
    };
    csv.lines().map(kept).collect()
}

/// Every file in `folder`, at any depth, that is there now.
pub fn objects(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                _ => drop(found.insert(entry.path())),
            }
        }
    }
    found
}

/// Whether a checkpoint of the run in `folder` has parts and no manifest: it is being written.
pub fn checkpoint_in_writing(folder: &Path) -> bool {
    let checkpoints = std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
    checkpoints.map(|entry| entry.path()).any(|checkpoint| {
        let names = objects(&checkpoint);
        !names.is_empty() && !names.contains(&checkpoint.join("manifest.json"))
    })
}

/// The step of the newest checkpoint, 0 when there is none.
pub fn newest_checkpoint(place: &Path) -> u64 {
    let manifests =
        objects(&place.join("checkpoints")).into_iter().filter(|path| path.ends_with("manifest.json"));
    let step = |path: PathBuf| path.parent()?.file_name()?.to_str()?.parse().ok();
    manifests.filter_map(step).max().unwrap_or(0)
}
