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
fn configs_and_dataloader_build_without_libtorch() {
    let links = |package: &str| {
        tree(package).lines().any(|line| line.starts_with("tch ") || line.starts_with("torch-sys "))
    };
    assert!(!links("anello-configs"));
    assert!(!links("anello-dataloader"));
    assert!(links("anello-worker"), "the test knows LibTorch when it sees it");
}
