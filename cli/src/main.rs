//! The `sluice` program: plans, converts, inspects, verifies and runs model files.
//!
//! Glue only: every command is one file in `commands/`, which parses its arguments, calls a crate and prints.

mod commands;
mod engine_args;
mod error;
mod generate;
mod ids;
mod npy;
mod plot;
mod profile;
mod recorder;
mod sampling;
mod size;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

const ABOUT: &str =
    "Runs mixture-of-experts language models far larger than memory by streaming their weights from SSD";

const EXAMPLES: &str = "\
Start here:
  sluice demo                                          a small model, start to end, in seconds
  sluice plan deepseek-r1 --ram 64GiB                  what a model would need and reach here
  sluice convert DeepSeek-R1/ r1.sluice                a Hugging Face checkpoint becomes one file
  sluice inspect r1.sluice                             what it holds and what it needs
  sluice run r1.sluice --prompt 'Once upon a time'     text

Exit codes: 0 success, 1 failure, 2 wrong usage.";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, about = ABOUT, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Convert(commands::convert::Args),
    Inspect(commands::inspect::Args),
    Verify(commands::verify::Args),
    Plan(commands::plan::Args),
    Synth(commands::synth::Args),
    Run(Box<commands::run::Args>),
    Logits(commands::logits::Args),
    Perplexity(commands::perplexity::Args),
    Calibrate(commands::calibrate::Args),
    Tokenize(commands::tokenize::Args),
    Trace(commands::trace::Args),
    Bench(commands::bench::Args),
    Demo(commands::demo::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Convert(args) => commands::convert::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Verify(args) => commands::verify::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Synth(args) => commands::synth::run(&args),
        Command::Run(args) => commands::run::run(&args),
        Command::Logits(args) => commands::logits::run(&args),
        Command::Perplexity(args) => commands::perplexity::run(&args),
        Command::Calibrate(args) => commands::calibrate::run(&args),
        Command::Tokenize(args) => commands::tokenize::run(&args),
        Command::Trace(args) => commands::trace::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Demo(args) => commands::demo::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is_broken_pipe() => ExitCode::SUCCESS,
        Err(e) => {
            terminal::error(&e);
            ExitCode::from(e.exit_code())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself() {
        fn check(command: &mut clap::Command) {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:"), "{} has no examples", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
            // Rendering adds clap's own `help` to commands that have others.
            command.get_subcommands_mut().filter(|c| c.get_name() != "help").for_each(check);
        }
        Cli::command().get_subcommands_mut().for_each(check);
    }
}
