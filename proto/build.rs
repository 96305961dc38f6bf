//! Generates the gRPC code. `protox` reads the `.proto` files, so that no protoc has to be installed.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=anello");
    let files = ["jobs", "ring", "peers"].map(|service| format!("anello/v1/{service}.proto"));
    let files = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("anello.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
