//! Batches of requests that cannot be lost: a file of requests becomes a file of results, whatever happens in between.
//!
//! A [`Batch`] has three files: the input, with a request on each line ([`Line`]), the output, with a result on each line, and the
//! journal beside the output. What makes the answers is behind the trait [`Answerer`]; this crate knows no model.
//!
//! ```text
//! input ──index──▶ order ──lines──▶ Answerer ──tokens──▶ journal
//!                                      └──────results──▶ output, then journal
//! ```
//!
//! * The input is read twice: once to find its lines, their order and what is wrong with them ([`Index`], some 60 bytes for each line),
//!   and line by line when their turn comes.
//! * Every sampled token goes to the journal. A run that was interrupted hands the tokens of each request back to the answerer, which
//!   goes on behind them.
//! * A result is written to the output first, and to the journal afterwards. The next run cuts off what the output has beyond the
//!   journal, so each result is there exactly once; what was cut comes again, in the same bytes, if the answerer makes the same of
//!   the same tokens.
//! * All files are reached through [`Files`], so that tests can have every operation fail.

mod claim;
mod earlier;
mod error;
mod files;
mod index;
mod journal;
mod line;
mod output;
mod run;

pub use earlier::Earlier;
pub use error::BatchError;
pub use files::{Access, Files, OpenFile, SystemFiles};
pub use index::{Entry, Index, LONGEST_LINE};
pub use journal::{JOURNAL_MAGIC, Token};
pub use line::{Line, LineError, Named, PLAIN_TOKENS, Wanted, id_of, number_of};
pub use run::{
    Answerer, Batch, Ending, Event, Events, Failed, Failure, Identity, Job, Ongoing, Options, Progress, Summary, Sync,
    Watch,
};
