//! A full disk, for real: a file system of a few MiB.

use std::path::{Path, PathBuf};
use std::process::Command;

use anello_tests::{Process, wait_until};

use super::world;

/// A small file system in memory, gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, bytes: u64) -> Result<Self, String> {
        std::fs::create_dir_all(at).map_err(|e| e.to_string())?;
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        match mounted {
            Ok(done) if done.status.success() => Ok(Self(at.to_owned())),
            Ok(done) => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
            Err(cause) => Err(cause.to_string()),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_costs_a_checkpoint_and_not_the_run() {
    let world = world();
    let disk = match SmallDisk::mount(&world.folder.join("disk"), 40 << 20) {
        Ok(disk) => disk,
        Err(why) => return println!("skipped: no small file system can be mounted here: {why}"),
    };
    // Room for the first checkpoints only: one is 3 MiB.
    let filler = disk.0.join("filler");
    std::fs::write(&filler, vec![0; 30 << 20]).unwrap();
    let mut process = Process::start(&world.folder, &["run", "small.toml", "--out", "disk/run"]);
    wait_until("it tells of the full disk", || {
        process.ended() || process.out().contains("could not be written now, training goes on")
    });
    assert!(!process.ended(), "a full disk ended it\nout: {}\nlog: {}", process.out(), process.log());
    assert!(process.out().contains("No space left on device"), "{}", process.out());
    std::fs::remove_file(&filler).unwrap();
    process.wait().expect(0);
    let events = world.anello(&["events", "disk/run"]).expect(0);
    assert!(events.contains("No space left on device"), "the log tells of it: {events}");
    let told = world.anello(&["checkpoint", "diff", "undisturbed", "disk/run"]).expect(0);
    assert!(told.contains("are equal: all"), "{told}");
    world.anello(&["checkpoint", "verify", "disk/run"]).expect(0);
    let strays =
        anello_tests::objects(&disk.0).into_iter().find(|path| path.display().to_string().contains('#'));
    assert_eq!(strays, None, "what could not be written whole is gone");
}
