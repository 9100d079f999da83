//! `sluice serve`: models over HTTP.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use sluice_generate::Drafts;
use sluice_model::EngineOptions;
use sluice_server::logs::{self, LogFormat};
use sluice_server::{BatchOptions, Guard, ServerOptions, SessionOptions, serve_until_told};

use crate::drafts::DraftArgs;
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::size::{parse_count, parse_size};
use crate::terminal::note;

const EXAMPLES: &str = "\
The server speaks the APIs of OpenAI (/v1/chat/completions, /v1/completions, /v1/responses), Anthropic (/v1/messages) and \
Ollama (/api/chat, /api/generate), and has a page for people at /. The name of a model is that of its file, without folder \
and extension. docs/SERVER.md says how to set up clients.

Examples:
  sluice serve r1.sluice
  sluice serve glm.sluice qwen.sluice --budget 48GiB --sessions ~/.cache/sluice/sessions
  sluice serve r1.sluice --host 0.0.0.0 --api-key \"$(cat key.txt)\"";

/// Serve models over HTTP: the APIs of OpenAI, Anthropic and Ollama, and a page
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Model files, their names in the folder of models, or hf:NAME; each is loaded on its first request, and they share the budget
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,

    /// Make the model files of hf:NAME that do not exist, without asking
    #[arg(long)]
    pub(crate) yes: bool,

    /// Address to listen at; an address that other machines can reach needs --api-key
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    host: String,

    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080, help_heading = "Server")]
    port: u16,

    /// Key that clients must send; may be given several times, or as SLUICE_API_KEY, which does not appear in the list of processes
    #[arg(long, value_name = "KEY", help_heading = "Server")]
    api_key: Vec<String>,

    /// Let everybody who can reach the address use the server without a key
    #[arg(long, help_heading = "Server")]
    insecure: bool,

    /// Name by which clients reach this server, besides addresses and localhost; may be given several times
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    allow_host: Vec<String>,

    /// Origin whose web pages may use this server, such as `https://chat.example`; may be given several times
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    allow_origin: Vec<String>,

    /// Folder for what models remember of conversations, so that these continue after a restart [default: memory only]
    #[arg(long, value_name = "DIR", help_heading = "Server")]
    sessions: Option<PathBuf>,

    /// Most bytes of sessions in that folder; the least useful are removed first
    #[arg(long, value_name = "SIZE", default_value = "20GB", value_parser = parse_size, help_heading = "Server")]
    sessions_max: u64,

    /// Days after which unused sessions are deleted
    #[arg(long, value_name = "DAYS", default_value_t = 30, help_heading = "Server")]
    sessions_days: u64,

    /// Folder for files and batches (/v1/files, /v1/batches), which survive a restart [default: there are none]
    #[arg(long, value_name = "DIR", help_heading = "Server")]
    batches: Option<PathBuf>,

    /// Most tokens of a conversation, prompt and answer together [default: 8192, or the model's limit if that is less]
    #[arg(long, value_name = "N", value_parser = parse_count, help_heading = "Server")]
    context: Option<NonZeroUsize>,

    /// Conversations of that length for which memory is planned; more run while they are shorter
    #[arg(long, value_name = "N", default_value = "2", value_parser = parse_count, help_heading = "Server")]
    parallel: NonZeroUsize,

    /// Requests that may wait; others are refused, and told when to try again (status 429)
    #[arg(long, value_name = "N", default_value = "64", value_parser = parse_count, help_heading = "Server")]
    queue: NonZeroUsize,

    /// Remove the parts of prompts that agents change on every call without saying anything new, so that the rest is not read again
    #[arg(long, help_heading = "Server")]
    normalise_agents: bool,

    /// Seconds in which answers must finish once the server is told to end (SIGTERM or Ctrl-C)
    #[arg(long, value_name = "SECONDS", default_value_t = 30, help_heading = "Server")]
    grace: u64,

    /// Write logs as JSON, one object per line, instead of text
    #[arg(long, help_heading = "Server")]
    log_json: bool,

    /// Also log the contents of requests
    #[arg(long, help_heading = "Server")]
    log_prompts: bool,

    #[command(flatten)]
    drafts: DraftArgs,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Most tokens of a conversation, by default.
const CONTEXT: usize = 8192;
/// Marks of a sequence, at the ends of its latest messages.
const MARKS: usize = 4;

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    logs::init(if args.log_json { LogFormat::Json } else { LogFormat::Text });
    args.engine.say_what_is_lossy();
    let options = options(args)?;
    let ready = |address: SocketAddr| note(&format_args!("listening at http://{address}"));
    serve_until_told(options, args.insecure, ready).map_err(|error| CliError::Failure(error.to_string()))
}

fn options(args: &Args) -> Result<ServerOptions, CliError> {
    let mut keys = args.api_key.clone();
    keys.extend(std::env::var("SLUICE_API_KEY").ok().filter(|key| !key.is_empty()));
    let is_sendable = |key: &String| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
    if !keys.iter().all(is_sendable) {
        let message = "--api-key is empty, or has white space or characters outside ASCII: clients cannot send it";
        return Err(CliError::Usage(message.into()));
    }
    let context = args.context.map_or(CONTEXT, NonZeroUsize::get);
    let engine = EngineOptions { sequences: Some(args.parallel.get()), marks: MARKS, ..args.engine.options(context) };
    let drafting = args.drafts.or(Drafts::Off)?;
    let days = Duration::from_secs(args.sessions_days.saturating_mul(24 * 60 * 60));
    let sessions = |folder: &PathBuf| SessionOptions {
        folder: folder.clone(),
        max_bytes: args.sessions_max,
        expire_after: Some(days),
    };
    Ok(ServerOptions {
        files: args.files.clone(),
        address: address(&args.host, args.port)?,
        guard: Guard { keys, hosts: args.allow_host.clone(), origins: args.allow_origin.clone() },
        engine,
        queue: args.queue.get(),
        sessions: args.sessions.as_ref().map(sessions),
        batches: args.batches.clone().map(BatchOptions::new),
        grace: Duration::from_secs(args.grace),
        drafts: drafting.drafts,
        draft_tokens: drafting.tokens,
        log_prompts: args.log_prompts,
        normalise: args.normalise_agents,
        ..ServerOptions::default()
    })
}

fn address(host: &str, port: u16) -> Result<SocketAddr, CliError> {
    if host.eq_ignore_ascii_case("localhost") {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let found = (host, port).to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| CliError::Usage(format!("--host {host}: there is no such address")))
}
