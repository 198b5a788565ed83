//! The process: arguments to settings to server. Wiring only.

use std::process::ExitCode;

/// 15 % less CPU a request than the system's allocator, for 8 MiB more at rest.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Pages of 2 MiB would make every open stream cost twice its memory. Not every kernel has the switch.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    infergate::cli::run()
}
