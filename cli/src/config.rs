//! `anello config` and `anello plan`, and how every command loads a config.

use anello_configs::{Cluster, Gpu, LoadOptions, Loaded, Origin, Plan, RunConfig};

use crate::failure::{Exit, Failure, Outcome};
use crate::screen::Screen;
use crate::tokenizer::tokenizer_of;

/// Which config, and what is set over it.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// A preset (tiny, mano, ouro-1.4b, …) or a TOML file.
    pub config: String,
    /// Set a key over the config: `stage.stable.lr=1e-4`. May be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

/// Loads a config with the layers from outside: `ANELLO_SET__…` variables, then `sets`.
///
/// Its paths are absolute, so that it means the same from any directory.
pub fn load(config: &str, sets: &[String]) -> Result<Loaded, Failure> {
    load_text(config, None, sets)
}

/// The config `text`, which messages call `config`, with the environment and `sets` laid over it.
pub fn load_text(config: &str, text: Option<String>, sets: &[String]) -> Result<Loaded, Failure> {
    let variable = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    Ok(RunConfig::load(&LoadOptions {
        config: config.to_owned(),
        text,
        directory: std::env::current_dir()?,
        environment: std::env::vars_os().filter_map(variable).collect(),
        sets: sets.to_vec(),
    })?)
}

/// Checks what a config needs to be trained: that its sources are there, and that its tokenizer is theirs.
pub fn check_ready(loaded: &Loaded) -> Result<(), Failure> {
    loaded.check_sources()?;
    tokenizer_of(&loaded.config).map(drop)
}

/// Arguments of `anello config`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Say behind each key where it was written.
    #[arg(long)]
    origins: bool,
}

/// `anello config`
pub fn show(args: &ShowArgs, screen: &Screen) -> Outcome {
    let loaded = load(&args.config.config, &args.config.sets)?;
    let text = loaded.config.to_toml();
    screen.print(&if args.origins { with_origins(&text, &loaded) } else { text })?;
    Ok(Exit::Done)
}

/// The TOML with a comment behind each key.
fn with_origins(toml: &str, loaded: &Loaded) -> String {
    let mut section = "";
    let mut text = String::new();
    for line in toml.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name;
        }
        match line.split_once(" = ") {
            Some((key, _)) => {
                let key = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
                let origin = origin(loaded, &key).map_or("default".to_owned(), |origin| origin.to_string());
                text.push_str(&format!("{line}  # {origin}\n"));
            }
            None => text.push_str(&format!("{line}\n")),
        }
    }
    text
}

/// Where a key was written, or the value whole in which it stands (a mixture).
fn origin<'a>(loaded: &'a Loaded, key: &str) -> Option<&'a Origin> {
    let parents = std::iter::successors(Some(key), |key| key.rsplit_once('.').map(|(parent, _)| parent));
    parents.take(2).find_map(|key| loaded.origins.get(key))
}

/// Arguments of `anello plan`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The kind of GPU: a100, h100, h200, b200, l40s, rtx-4090.
    #[arg(long, default_value = "h100")]
    gpu: Gpu,
    /// How many GPUs, one worker each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Share of the GPU's peak that the model's arithmetic reaches (MFU), above 0 to 1.
    #[arg(long, default_value_t = 0.4, value_parser = share)]
    utilisation: f64,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("give a share above 0, at most 1".to_owned()),
    }
}

/// `anello plan`
pub fn plan(args: &PlanArgs, screen: &Screen) -> Outcome {
    let loaded = load(&args.config.config, &args.config.sets)?;
    let PlanArgs { gpu, count, utilisation, .. } = *args;
    screen.print(&Plan::new(&loaded.config, Cluster { gpu, count, utilisation }).render())?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_tells_where_it_was_written() {
        let options =
            LoadOptions { sets: vec!["stage.stable.lr=1e-4".to_owned()], ..LoadOptions::new("tiny") };
        let loaded = RunConfig::load(&options).unwrap();
        let text = with_origins(&loaded.config.to_toml(), &loaded);
        assert!(text.contains("name = \"tiny\"  # preset:tiny:3:"), "{text}");
        assert!(text.contains("\nlr = 0.0001  # --set stage.stable.lr=1e-4\n"), "{text}");
        assert!(text.contains("# default\n"), "{text}");
        let (_, mixture) = text.split_once("mixture.code = ").unwrap();
        assert!(mixture.lines().next().unwrap().contains("# preset:tiny:"), "{text}");
    }

    #[test]
    fn a_share_is_a_share() {
        assert_eq!(share("0.4"), Ok(0.4));
        assert_eq!(share("1"), Ok(1.0));
        for text in ["0", "-1", "1.01", "NaN", "40 %"] {
            assert!(share(text).is_err(), "{text}");
        }
    }
}
