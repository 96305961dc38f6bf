//! `scripts/gpu-check`, as far as a machine without a GPU can run it: over real runs of the command, on the CPU.

use std::path::Path;
use std::process::Command;

use anello_tests::binary;

#[test]
fn the_script_for_gpus_works_without_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let table = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gpu-check.json");
    let done = Command::new("python3")
        .arg(root.join("scripts/gpu-check"))
        .args(["--dry-run", "--budget", "1500", "--anello"])
        .arg(binary())
        .arg("--out")
        .arg(&table)
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}");
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(table).unwrap()).unwrap();
    let verdict = |check: &str| {
        let row = rows.iter().find(|row| row["check"].as_str().unwrap().starts_with(check));
        row.unwrap_or_else(|| panic!("no row {check}: {said}"))["verdict"].as_str().unwrap().to_owned()
    };
    for check in [
        "losses, fp32",
        "losses, bf16",
        "same bits twice",
        "same bits over 1",
        "same bits over 2",
        "same bits over 4",
    ] {
        assert_eq!(verdict(check), "ok", "{check}: {said}");
    }
    // Where the run was over before the kill, there is nothing to be judged.
    assert!(["ok", "-"].contains(&verdict("same bits, kill and join").as_str()), "{said}");
    for check in ["tokens/s", "MFU", "memory", "cost of fixed bits", "checkpoint stall", "bus bandwidth"] {
        assert!(["ok", "-"].contains(&verdict(check).as_str()), "{check}: {said}");
    }
}
