//! `sluice completions`: scripts with which a shell completes commands and options.

use clap_complete::{Shell, generate};

use crate::error::CliError;
use crate::terminal::print_as_is;

const EXAMPLES: &str = "\
Examples:
  sluice completions bash > ~/.local/share/bash-completion/completions/sluice
  sluice completions zsh > \"${fpath[1]}/_sluice\"
  sluice completions fish > ~/.config/fish/completions/sluice.fish";

/// Print completions of commands and options for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: &Args, mut program: clap::Command) -> Result<(), CliError> {
    let mut script = Vec::new();
    generate(args.shell, &mut program, "sluice", &mut script);
    print_as_is(&String::from_utf8_lossy(&script))
}
