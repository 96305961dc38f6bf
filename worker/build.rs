//! Tells the build which git revision it is of, and compiles what LibTorch offers in C++ alone.

use std::path::PathBuf;
use std::process::Command;

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// `src/ffi/shim.cpp`, with the headers that torch-sys is built with.
fn shim() {
    println!("cargo:rerun-if-changed=src/ffi/shim.cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let folder = |name| std::env::var_os(name).map(PathBuf::from);
    let Some(libtorch) = folder("LIBTORCH_INCLUDE").or_else(|| folder("LIBTORCH")) else {
        panic!("LIBTORCH is not set; run `make setup`, and cargo inside of the repository");
    };
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(1)
        .include(libtorch.join("include"))
        .flag("-Wno-unused-parameter")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .file("src/ffi/shim.cpp")
        .compile("anello_shim");
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    shim();
    let Some(head) = git(&["rev-parse", "--short=12", "HEAD"]) else { return };
    // The files that change with the revision, wherever the git folder is.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--path-format=absolute", "--git-path", file]) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    println!("cargo:rustc-env=ANELLO_REVISION={head}");
}
