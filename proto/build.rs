//! Generates the gRPC code. `protox` reads the `.proto` files, so that no protoc has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=anello");
    let files = protox::compile(["anello/v1/ring.proto", "anello/v1/peers.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
