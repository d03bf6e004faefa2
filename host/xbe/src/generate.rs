//! `completions` and `man`: what is made from the definition of the command line.

use std::io::{self, Write};
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::error::Error;

/// `completions`.
pub fn completions(shell: Shell) -> Result<u8, Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "xbe", &mut script);
    io::stdout()
        .lock()
        .write_all(&script)
        .map_err(Error::Output)?;
    Ok(0)
}

/// `man`.
pub fn man(dir: &Path) -> Result<u8, Error> {
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
        .map_err(|source| Error::Write {
            path: dir.to_owned(),
            source,
        })?;
    Ok(0)
}
