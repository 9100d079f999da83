//! `sluice picture`: pictures for the documents.

use crate::error::CliError;
use crate::plot::flow::data_flow;
use crate::terminal::print_as_is;

const EXAMPLES: &str = "\
Examples:
  sluice picture data-flow > docs/pictures/data-flow.svg";

/// Print a picture for the documents as SVG
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, hide = true)]
pub(crate) struct Args {
    /// The picture
    picture: Picture,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Picture {
    /// From a checkpoint to text
    DataFlow,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    match args.picture {
        Picture::DataFlow => print_as_is(&data_flow()),
    }
}
