//! The `sluice` program: plans, converts, inspects, verifies and runs model files.
//!
//! Glue only: every command is one file in `commands/`, which parses its arguments, calls a crate and prints.

mod batch_load;
mod batch_plan;
mod batch_progress;
mod chat;
mod commands;
mod doctor;
mod drafts;
mod early;
mod engine_args;
mod error;
mod feed;
mod fetch;
mod generate;
mod ids;
mod input;
mod machine;
mod meant;
mod nearest;
mod npy;
mod plot;
mod profile;
mod progress;
mod recorder;
mod sampling;
mod saved;
mod size;
mod stage;
mod striping;
mod terminal;
mod text_files;
mod types;
mod version;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::error::CliError;
use crate::terminal::{ProgressKind, Wishes};

const ABOUT: &str =
    "Runs mixture-of-experts language models far larger than memory by streaming their weights from SSD";

const EXAMPLES: &str = "\
Start here:
  sluice demo                                          a small model, start to end, in seconds
  sluice plan deepseek-r1 --ram 64GiB                  what a model would need, and how fast it would be
  sluice convert DeepSeek-R1/ r1.sluice                a Hugging Face checkpoint becomes one file
  sluice convert hf:deepseek-ai/DeepSeek-R1 r1.sluice  the same straight from the hub
  sluice inspect r1.sluice                             what it holds and what it needs
  sluice run r1.sluice --prompt 'Once upon a time'     text
  sluice chat r1.sluice                                a conversation
  sluice serve r1.sluice                               the same over HTTP, for clients and for people
  sluice batch r1.sluice in.jsonl out.jsonl            many requests; a crash loses none of them

Exit codes: 0 success, 1 failure, 2 wrong usage; `batch` and `ask` have more.";

/// The output of `sluice` alone.
const WELCOME: &str = "\
Five commands do most of the work:

  sluice demo                                          a small model, start to end, in seconds
  sluice plan deepseek-r1 --ram 64GiB                  what a model would need, and how fast it would be
  sluice convert hf:Qwen/Qwen3-30B-A3B qwen.sluice     a model of the Hugging Face hub, or a folder, becomes one file
  sluice chat qwen.sluice                              a conversation in the terminal
  sluice serve qwen.sluice                             the same over HTTP, for editors, agents and people

Something is slow or refused: sluice doctor. All commands: sluice --help. One of them: sluice help run.";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, long_version = version::VERSION.as_str(), about = ABOUT, after_help = EXAMPLES)]
#[command(max_term_width = 100)]
struct Cli {
    /// Print only errors on standard error, neither notes nor progress
    #[arg(short, long, global = true, help_heading = "Every command")]
    quiet: bool,

    /// How to show the progress of long work on standard error
    #[arg(long, value_name = "HOW", global = true, default_value = "auto", help_heading = "Every command")]
    progress: ProgressKind,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Convert(commands::convert::Args),
    Pull(commands::pull::Args),
    List(commands::list::Args),
    Rm(commands::rm::Args),
    Inspect(commands::inspect::Args),
    Verify(commands::verify::Args),
    Plan(commands::plan::Args),
    Synth(commands::synth::Args),
    Set(commands::set::Args),
    Upgrade(commands::upgrade::Args),
    Restripe(commands::restripe::Args),
    Run(Box<commands::run::Args>),
    Chat(Box<commands::chat::Args>),
    Serve(Box<commands::serve::Args>),
    Batch(Box<commands::batch::Args>),
    Ask(Box<commands::ask::Args>),
    Logits(commands::logits::Args),
    Perplexity(commands::perplexity::Args),
    Compare(commands::compare::Args),
    Calibrate(commands::calibrate::Args),
    Tokenize(commands::tokenize::Args),
    Trace(commands::trace::Args),
    Bench(commands::bench::Args),
    Demo(commands::demo::Args),
    Doctor(commands::doctor::Args),
    Completions(commands::completions::Args),
    Man(commands::man::Args),
    Picture(commands::picture::Args),
}

/// Replaces names on the hub by the model files that were made from them, wherever a command takes one.
fn find_models(command: &mut Command) -> Result<(), CliError> {
    if let Command::Plan(args) = command {
        return args.find_model();
    }
    let (files, yes): (Vec<&mut PathBuf>, bool) = match command {
        Command::Run(args) => (vec![&mut args.file], args.yes),
        Command::Chat(args) => (vec![&mut args.file], args.yes),
        Command::Serve(args) => (args.files.iter_mut().collect(), args.yes),
        Command::Batch(args) => (vec![&mut args.file], args.yes),
        Command::Ask(args) => (vec![&mut args.file], args.yes),
        Command::Inspect(args) => (vec![&mut args.file], false),
        Command::Verify(args) => (vec![&mut args.file], false),
        Command::Set(args) => (vec![&mut args.file], false),
        Command::Upgrade(args) => (vec![&mut args.file], false),
        Command::Restripe(args) => (vec![&mut args.file], false),
        Command::Logits(args) => (vec![&mut args.file], false),
        Command::Perplexity(args) => (vec![&mut args.file], false),
        Command::Compare(args) => (vec![&mut args.reference, &mut args.other], false),
        Command::Calibrate(args) => (vec![&mut args.file], false),
        Command::Tokenize(args) => (vec![&mut args.file], false),
        Command::Bench(args) => (args.file().into_iter().collect(), false),
        Command::Doctor(args) => (args.file().into_iter().collect(), false),
        _ => return Ok(()),
    };
    files.into_iter().try_for_each(|file| {
        *file = fetch::model_file(file, yes)?;
        Ok(())
    })
}

fn main() -> ExitCode {
    sluice_storage::io::survive_file_size_limit();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refused) => return refuse(&refused),
    };
    terminal::keep_wishes(Wishes { is_quiet: cli.quiet, progress: cli.progress });
    let mut command = cli.command;
    let outcome = find_models(&mut command).and_then(|()| run(command));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is_broken_pipe() => ExitCode::SUCCESS,
        Err(e) => {
            terminal::error(&with_suggestion(&e));
            ExitCode::from(e.exit_code())
        }
    }
}

/// The error, with a suggestion if a file that it names does not exist and another has a similar name.
fn with_suggestion(error: &CliError) -> String {
    let mut said = error.to_string();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(suggestion) = nearest::suggestion(error, arguments.iter().map(|argument| argument.as_os_str())) {
        let _ = write!(said, "\n{suggestion}");
    }
    said
}

fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Convert(args) => commands::convert::run(&args),
        Command::Pull(args) => commands::pull::run(&args),
        Command::List(args) => commands::list::run(&args),
        Command::Rm(args) => commands::rm::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Verify(args) => commands::verify::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Synth(args) => commands::synth::run(&args),
        Command::Set(args) => commands::set::run(&args),
        Command::Upgrade(args) => commands::upgrade::run(&args),
        Command::Restripe(args) => commands::restripe::run(&args),
        Command::Run(args) => commands::run::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Serve(args) => commands::serve::run(&args),
        Command::Batch(args) => commands::batch::run(&args),
        Command::Ask(args) => commands::ask::run(&args),
        Command::Logits(args) => commands::logits::run(&args),
        Command::Perplexity(args) => commands::perplexity::run(&args),
        Command::Compare(args) => commands::compare::run(&args),
        Command::Calibrate(args) => commands::calibrate::run(&args),
        Command::Tokenize(args) => commands::tokenize::run(&args),
        Command::Trace(args) => commands::trace::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Demo(args) => commands::demo::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Completions(args) => commands::completions::run(&args, Cli::command()),
        Command::Man(args) => commands::man::run(&args, Cli::command()),
        Command::Picture(args) => commands::picture::run(&args),
    }
}

/// Prints help, the version, or an error in the command line, whose words may come from a folder of unknown origin.
fn refuse(refused: &clap::Error) -> ExitCode {
    if !refused.use_stderr() {
        refused.exit();
    }
    let text = refused.render().to_string();
    // A command line without a command asks for help.
    if std::env::args_os().len() == 1 {
        terminal::report(&format!("{ABOUT}.\n\n{WELCOME}"));
        return ExitCode::from(2);
    }
    if refused.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        terminal::report(text.trim_end());
        return ExitCode::from(2);
    }
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let text = meant::with_meant(&Cli::command(), refused, &arguments, text.strip_prefix("error: ").unwrap_or(&text));
    terminal::error(&text.trim_end());
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            // Rendering adds clap's own `help` to commands that have subcommands.
            command.get_subcommands_mut().filter(|c| c.get_name() != "help").for_each(check);
        }
        Cli::command().get_subcommands_mut().for_each(check);
    }

    const USAGE: &str = include_str!("../../docs/USAGE.md");

    /// The section of a command in USAGE.md, and the sections to which it refers.
    fn section(title: &str) -> &'static str {
        let start = USAGE.find(&format!("\n## {title}\n")).unwrap_or_else(|| panic!("no section `{title}`"));
        let rest = &USAGE[start + 1..];
        &rest[..rest[1..].find("\n## ").map_or(rest.len(), |end| end + 1)]
    }

    #[test]
    fn every_option_is_in_usage_md() {
        fn check(command: &clap::Command, title: &str) {
            let shared = section("Options of all commands that compute");
            let own = section(title);
            for argument in command.get_arguments().filter_map(|a| a.get_long()) {
                if matches!(argument, "help" | "version") {
                    continue;
                }
                let option = format!("--{argument}");
                let named = |text: &str| {
                    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
                    text.match_indices(&option).any(|(at, _)| ends(&text[at + option.len()..]))
                };
                let computes = command.get_arguments().any(|a| a.get_long() == Some("no-calibration"))
                    && own.contains("#options-of-all-commands-that-compute");
                assert!(named(own) || (computes && named(shared)), "docs/USAGE.md: `{title}` lacks {option}");
            }
        }
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            // Commands of one section: `trace replay` and `trace stats` are in `trace`.
            check(command, name);
            for inner in command.get_subcommands() {
                let title = format!("{name} {}", inner.get_name());
                let own_section = USAGE.contains(&format!("\n## {title}\n"));
                check(inner, if own_section { &title } else { name });
            }
        }
    }

    #[test]
    fn every_variable_is_in_usage_md() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let runtime = ["storage", "model", "text", "generate"].map(|c| format!("runtime/{c}"));
        let others = ["checksum", "cli", "converter", "format", "hub", "kernels", "lab"].map(str::to_owned);
        let mut folders: Vec<_> = runtime.iter().chain(&others).map(|c| root.join(c).join("src")).collect();
        let mut found = std::collections::BTreeSet::new();
        while let Some(folder) = folders.pop() {
            for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                // Variables that only tests use are described in the tests.
                if path.ends_with("tests.rs") {
                    continue;
                }
                let Ok(text) = std::fs::read_to_string(path) else { continue };
                // Names of variables in quotes, as `env::var` gets them.
                for (at, _) in text.match_indices(concat!("\"", "SLUICE_")) {
                    let name = text[at + 1..].split('"').next().unwrap();
                    let is_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
                    if name.chars().all(is_name) && !name.ends_with('_') {
                        found.insert(name.to_owned());
                    }
                }
            }
        }
        assert!(found.contains("SLUICE_ISA"), "{found:?}");
        for name in found.iter().map(String::as_str).chain([
            "XDG_CACHE_HOME",
            "XDG_STATE_HOME",
            "HOME",
            "TMPDIR",
            "NO_COLOR",
            "CLICOLOR",
            "TERM",
        ]) {
            assert!(section("Environment variables").contains(&format!("`{name}`")), "docs/USAGE.md lacks {name}");
        }
    }
}
