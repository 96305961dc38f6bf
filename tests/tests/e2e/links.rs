//! What links what.

use std::process::Command;

/// The packages that `package` is built from.
fn tree(package: &str) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let done = Command::new(cargo)
        .args(["tree", "--package", package, "--edges", "normal,build", "--prefix", "none", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

#[test]
fn all_below_the_worker_builds_without_libtorch() {
    let links = |package: &str| {
        tree(package).lines().any(|line| line.starts_with("tch ") || line.starts_with("torch-sys "))
    };
    for package in ["anello-configs", "anello-store", "anello-dataloader"] {
        assert!(!links(package), "{package}");
    }
    assert!(links("anello-worker"), "the test knows LibTorch when it sees it");
}
