//! `sluice run`: continues a prompt.

use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;
use sluice_format::{ModelFile, ModelSpec, SOURCE_CONFIG_BLOB};
use sluice_runtime::Engine;
use sluice_runtime::sampler::SamplerConfig;
use sluice_runtime::text::{
    ChatTemplate, GenerationDefaults, Message, RenderOptions, StopCondition, Tokenizer, encode_chat,
};

use crate::engine_args::{EngineArgs, tokenizer};
use crate::error::CliError;
use crate::generate::{Finish, Generation, Request, generate};
use crate::ids::{TokenIds, check_ids};
use crate::profile::Profile;
use crate::recorder::Recorder;
use crate::sampling::SamplingArgs;
use crate::terminal::{note, print, print_json};

const EXAMPLES: &str = "\
The prompt is passed to the model as it is; --chat puts it into the model's chat template. Text appears as it is \
generated; the report of --profile goes to standard error.

Examples:
  sluice run r1.sluice --prompt 'The capital of France is' -n 32
  sluice run r1.sluice --prompt-file letter.txt --budget 24GiB --profile
  echo 'ROMEO:' | sluice run demo.sluice --temperature 0.8 --seed 7
  sluice run model.sluice --prompt-ids 1,2,3 -n 16 --temperature 0 --ids
  sluice run r1.sluice --prompt 'Hello' --json | jq .profile.decode.tokens_per_second";

/// Continue a prompt, streaming experts from the drive as they are needed
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file
    file: PathBuf,

    /// Text to continue [default: standard input]
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    prompt: Option<String>,

    /// File with the text to continue, taken byte for byte
    #[arg(long, value_name = "FILE", help_heading = "Prompt", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,

    /// Token ids to continue, such as 1,2,3; needs no tokenizer
    #[arg(long, value_name = "IDS", help_heading = "Prompt", conflicts_with_all = ["prompt", "prompt_file"])]
    prompt_ids: Option<TokenIds>,

    /// Most tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,

    /// Stop before this text appears; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on when the model says that it is done
    #[arg(long)]
    ignore_eos: bool,

    /// Give the prompt as a user's message, in the chat template that came with the checkpoint
    #[arg(long, conflicts_with = "prompt_ids")]
    chat: bool,

    /// System message before the user's
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,

    /// Print the generated token ids instead of text: one line, separated by commas
    #[arg(long, conflicts_with = "json", help_heading = "Output")]
    ids: bool,

    /// Say on standard error where time and bytes went
    #[arg(long, help_heading = "Output")]
    profile: bool,

    /// Record the routing of every token as JSON lines, for `sluice trace`
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    trace: Option<PathBuf>,

    /// Print one JSON object with text, ids and profile, at the end
    #[arg(long, help_heading = "Output")]
    json: bool,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    engine: EngineArgs,

    /// Tokens that the key-value cache has room for [default: prompt and -n]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    context: Option<usize>,
}

/// Everything that can be wrong before weights are read.
struct Prepared {
    tokenizer: Option<Tokenizer>,
    prompt: Vec<u32>,
    context: usize,
    sampling: SamplerConfig,
    stop: StopCondition,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let started = Instant::now();
    if let Some(trace) = &args.trace {
        let prompt = args.prompt_file.as_deref().unwrap_or(&args.file);
        CliError::refuse_inputs(trace, &[&args.file, prompt])?;
    }
    let prepared = prepare(args)?;
    let mut engine = args.engine.open(&args.file, prepared.context)?;
    let open_seconds = started.elapsed().as_secs_f64();
    let request = Request {
        prompt: &prepared.prompt,
        max_tokens: args.max_tokens,
        sampling: prepared.sampling,
        stop: &prepared.stop,
        tokenizer: prepared.tokenizer.as_ref(),
    };
    let mut recorder = args.trace.as_deref().map(|path| Recorder::start(path, &engine)).transpose()?;
    let generation = stream(args, &mut engine, &request, recorder.as_mut())?;
    recorder.map(Recorder::finish).transpose()?;
    if !args.engine.forget {
        // The counts are a convenience: a folder that cannot be written is no reason to fail or to complain.
        let _ = engine.save_counts();
    }
    let profile = Profile::new(&engine, &generation, open_seconds);
    report(args, &request, &generation, &profile)
}

fn prepare(args: &Args) -> Result<Prepared, CliError> {
    let file = ModelFile::open(&args.file)?;
    let name = args.file.display();
    let tokenizer = tokenizer(&file)?;
    if tokenizer.is_none() && !args.ids && !args.json {
        return Err(CliError::Usage(format!(
            "{name} has no tokenizer, so its output cannot be shown as text: ask for token ids with --ids"
        )));
    }
    if tokenizer.is_none() && !args.stop.is_empty() {
        return Err(CliError::Usage(format!("--stop needs a tokenizer, and {name} has none")));
    }
    let blob = |name| file.metadata().get(name);
    let defaults = GenerationDefaults::parse(blob("generation_config.json"), blob(SOURCE_CONFIG_BLOB))?;
    // Token ids are for programs, which compare them: greedy unless sampling is asked for.
    let recommended = if args.ids { GenerationDefaults::default() } else { defaults.clone() };
    let sampling = args.sampling.config(&recommended);
    sampling.validate()?;
    let eos = if args.ignore_eos { Default::default() } else { defaults.eos };
    let stop = StopCondition::new(eos, args.stop.clone())?;
    let prompt = prompt(args, tokenizer.as_ref(), &file)?;
    let context = context(args, prompt.len(), file.spec())?;
    Ok(Prepared { tokenizer, prompt, context, sampling, stop })
}

/// Generates and shows what is wanted while it comes.
fn stream(
    args: &Args,
    engine: &mut Engine,
    request: &Request<'_>,
    recorder: Option<&mut Recorder>,
) -> Result<Generation, CliError> {
    let mut first = true;
    generate(engine, request, recorder, &mut |id, text| match id {
        _ if args.json => Ok(()),
        Some(id) if args.ids => {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            print(&format!("{comma}{id}"))
        }
        _ if args.ids || text.is_empty() => Ok(()),
        _ => print(text),
    })
}

fn report(args: &Args, request: &Request<'_>, done: &Generation, profile: &Profile) -> Result<(), CliError> {
    if args.json {
        print_json(&json!({
            "text": done.text,
            "ids": done.ids,
            "finish": done.finish,
            "prompt_tokens": request.prompt.len(),
            "seed": request.sampling.seed,
            "temperature": request.sampling.temperature,
            "profile": profile,
        }))?;
    } else {
        print("\n")?;
    }
    if done.finish == Finish::Context {
        note(&format_args!(
            "note: stopped after {} tokens because the context of {} tokens is full; --context makes it longer, up to \
             the model's own limit",
            done.ids.len(),
            profile.memory.context,
        ));
    }
    if args.profile {
        note(&profile.report().trim_end());
    }
    Ok(())
}

/// The tokens to continue.
fn prompt(args: &Args, tokenizer: Option<&Tokenizer>, file: &ModelFile) -> Result<Vec<u32>, CliError> {
    let ids = match &args.prompt_ids {
        Some(TokenIds(ids)) => ids.clone(),
        None => {
            let text = prompt_text(args)?;
            let tokenizer = tokenizer.ok_or_else(|| {
                CliError::Usage(format!(
                    "{} has no tokenizer, so it cannot read text: give the prompt as --prompt-ids 1,2,3",
                    args.file.display()
                ))
            })?;
            if args.chat { chat(args, tokenizer, file, &text)? } else { tokenizer.encode(&text, true)? }
        }
    };
    if ids.is_empty() {
        return Err(CliError::Usage("the prompt is empty: give at least one token to continue".into()));
    }
    check_ids(&ids, file.spec().vocab_size)?;
    Ok(ids)
}

/// The prompt as a user's message in the model's own chat template. Nothing in it is taken for a control token.
fn chat(args: &Args, tokenizer: &Tokenizer, file: &ModelFile, text: &str) -> Result<Vec<u32>, CliError> {
    let template = ChatTemplate::find(|name| file.metadata().get(name))?;
    let template = template.ok_or_else(|| {
        let path = args.file.display();
        CliError::Usage(format!("{path} has no chat template: leave --chat away to continue the text as it is"))
    })?;
    let system = args.system.as_deref().map(|text| Message::new("system", text));
    let messages: Vec<_> = system.into_iter().chain([Message::new("user", text.trim_end_matches('\n'))]).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let options = RenderOptions { add_generation_prompt: true, now, ..RenderOptions::default() };
    Ok(encode_chat(tokenizer, &template, &messages, &options)?)
}

fn prompt_text(args: &Args) -> Result<String, CliError> {
    if let Some(text) = &args.prompt {
        return Ok(text.clone());
    }
    if let Some(path) = &args.prompt_file {
        return std::fs::read_to_string(path).map_err(CliError::file(path, "read the prompt"));
    }
    let mut stdin = io::stdin().lock();
    if stdin.is_terminal() {
        let message = "there is no prompt: give --prompt TEXT, --prompt-file FILE or --prompt-ids IDS, or pipe text in";
        return Err(CliError::Usage(message.into()));
    }
    let mut text = String::new();
    let failed = |e| CliError::Failure(format!("cannot read the prompt from standard input: {e}"));
    stdin.read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

/// Tokens that the session must hold.
fn context(args: &Args, prompt: usize, spec: &ModelSpec) -> Result<usize, CliError> {
    let wanted = args.context.unwrap_or(prompt.saturating_add(args.max_tokens)).min(spec.max_positions);
    if prompt > wanted {
        return Err(CliError::Usage(match args.context {
            Some(context) if context < spec.max_positions => {
                format!("the prompt has {prompt} tokens, more than the {context} of --context")
            }
            _ => format!("the prompt has {prompt} tokens, the model takes at most {}", spec.max_positions),
        }));
    }
    Ok(wanted)
}
