//! The program `xbed`; what it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    xbed::main()
}
