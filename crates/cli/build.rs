//! Answers for how the binary is linked: at a fixed address. Relocating a position-independent one
//! touches a hundred pages at each start, which is a good part of what `add` takes.

fn main() {
    println!("cargo:rustc-link-arg-bins=-no-pie");
    println!("cargo:rerun-if-changed=build.rs");
}
