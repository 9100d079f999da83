//! `sluice run`: continues a prompt.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use serde_json::json;
use sluice_format::ModelFile;
use sluice_generate::sampler::SamplerConfig;
use sluice_generate::{Drafts, WhenFull};
use sluice_model::memory::{Demand, MemoryPlan};
use sluice_model::{Engine, EngineOptions};
use sluice_text::{ChatTemplate, GenerationDefaults, Message, Special, StopCondition, Tokenizer, encode_chat};

use crate::drafts::DraftArgs;
use crate::early::Early;
use crate::engine_args::{EngineArgs, tokenizer};
use crate::error::CliError;
use crate::generate::{Finish, Generation, Request, generate};
use crate::ids::{TokenIds, check_ids};
use crate::input::{MAX_TEXT, read_text, text_of};
use crate::plot;
use crate::profile::Profile;
use crate::recorder::Recorder;
use crate::sampling::SamplingArgs;
use crate::terminal::{counted, json_number, note, print_json, print_text, report as print_report};
use crate::text_files::{CHAT_TEMPLATE, chat_options, read_template, try_out};

const EXAMPLES: &str = "\
The prompt is passed to the model as it is; --chat puts it into the model's chat template. Text appears as it is \
generated; the report of --profile goes to standard error.

Examples:
  sluice run r1.sluice --prompt 'The capital of France is' -n 32
  sluice run r1.sluice --prompt-file letter.txt --budget 24GiB --profile
  echo 'ROMEO:' | sluice run demo.sluice --temperature 0.8 --seed 7
  sluice run model.sluice --prompt-ids 1,2,3 -n 16 --temperature 0 --ids
  sluice run hf:Qwen/Qwen3-30B-A3B --chat --prompt 'Hello'
  sluice run r1.sluice --prompt 'Hello' --json | jq .profile.decode.tokens_per_second";

/// Continue a prompt, streaming experts from the drive as they are needed
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, group = clap::ArgGroup::new("conversation").multiple(true))]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME for the file made from a model on the hub
    pub(crate) file: PathBuf,

    /// Make the model file of hf:NAME if it does not exist, without asking
    #[arg(long)]
    pub(crate) yes: bool,

    /// Text to continue [default: standard input]
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    prompt: Option<String>,

    /// File with the text to continue, taken byte for byte
    #[arg(long, value_name = "FILE", help_heading = "Prompt", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,

    /// Token ids to continue, such as 1,2,3; needs no tokenizer
    #[arg(long, value_name = "IDS", help_heading = "Prompt", conflicts_with_all = ["prompt", "prompt_file"])]
    prompt_ids: Option<TokenIds>,

    /// Most tokens to generate; -1 continues until the model ends the text or the context is full
    #[arg(short = 'n', long, value_name = "N", default_value = "256", allow_negative_numbers = true, value_parser = parse_most)]
    max_tokens: usize,

    /// Stop before this text appears; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Continue after the model's end token
    #[arg(long)]
    ignore_eos: bool,

    /// Give the prompt as a user's message, in the chat template that came with the checkpoint
    #[arg(long, conflicts_with = "prompt_ids", group = "conversation")]
    chat: bool,

    /// Like --chat, with the chat template in this file, in Jinja, or JSON with one as `chat_template`
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_ids", group = "conversation")]
    chat_template: Option<PathBuf>,

    /// System message before the user's
    #[arg(long, value_name = "TEXT", requires = "conversation")]
    system: Option<String>,

    /// Show special tokens in the text, including the end token
    #[arg(long, help_heading = "Output")]
    special: bool,

    /// Print the generated token ids instead of text: one line, separated by commas
    #[arg(long, conflicts_with = "json", help_heading = "Output")]
    ids: bool,

    /// Report on standard error where time and bytes went
    #[arg(long, help_heading = "Output")]
    profile: bool,

    /// Draw where the time of a token went, as SVG
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    profile_svg: Option<PathBuf>,

    /// Record the routing of every token as JSON lines, for `sluice trace`
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    trace: Option<PathBuf>,

    /// Print one JSON object with text, ids and profile, at the end
    #[arg(long, help_heading = "Output")]
    json: bool,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    drafts: DraftArgs,

    #[command(flatten)]
    engine: EngineArgs,

    /// Tokens that the key-value cache has room for [default: prompt and -n; with -n -1 the model's limit, or what fits into a
    /// quarter of the memory]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    context: Option<usize>,

    /// What to do when the context is full
    #[arg(long, value_name = "POLICY", default_value = "stop", help_heading = "Engine")]
    when_full: FullChoice,

    /// With --when-full drop-oldest: tokens at the beginning that are never dropped [default: the prompt, but no more than half of
    /// the context]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    keep: Option<usize>,
}

/// Policies of a full context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FullChoice {
    /// End
    Stop,
    /// Drop the older half of the tokens after the kept ones, read the rest again, and continue
    DropOldest,
}

/// Tokens that are generated by default.
const USUAL: usize = 256;
/// As many tokens as there is room for.
const UNLIMITED: usize = usize::MAX;

/// The prompt, as it was given.
enum Given {
    Ids(Vec<u32>),
    Text(String),
}

/// What the tokenizer and the prompt make of the command.
struct Prepared {
    tokenizer: Option<Tokenizer>,
    prompt: Vec<u32>,
    stop: StopCondition,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let started = Instant::now();
    if let Some(trace) = &args.trace {
        let prompt = args.prompt_file.as_deref().unwrap_or(&args.file);
        CliError::refuse_output(trace, &[&args.file, prompt])?;
        args.engine.refuse_thrift("run --trace")?;
    }
    plot::check_target(args.profile_svg.as_deref(), &args.file)?;
    let drafting = args.drafts.or(usual_drafts(args))?;
    let file = ModelFile::open(&args.file)?;
    let sampling = sampling(args, &file)?;
    let given = given(args)?;
    let room = Room::of(args, &file);
    // The drive reads while the tokenizer is built.
    let shortest = if let Given::Ids(ids) = &given { ids.len() } else { 1 };
    let options = args.engine.options(room.context(shortest));
    let prediction = drafting.predicts(&file, &options);
    let early = Early::open(file, &EngineOptions { prediction, ..options })?;
    let prepared = prepare(args, early.file(), given)?;
    let context = room.checked(prepared.prompt.len())?;
    let when_full = when_full(args, prepared.prompt.len(), context)?;
    let mut engine = early.with_context(context, &args.engine, drafting)?;
    let open_seconds = started.elapsed().as_secs_f64();
    let request = Request {
        prompt: &prepared.prompt,
        max_tokens: args.max_tokens,
        sampling,
        stop: &prepared.stop,
        tokenizer: prepared.tokenizer.as_ref(),
        special: if args.special { Special::Shown } else { Special::Markup },
        when_full,
        scheduling: drafting.options(),
    };
    let mut recorder = args.trace.as_deref().map(|path| Recorder::start(path, &engine)).transpose()?;
    let generation = stream(args, &mut engine, &request, recorder.as_mut()).inspect_err(|_| {
        // The text so far ends here, and the error is a line of its own.
        if !args.json && io::stdout().is_terminal() {
            let _ = print_text("\n");
        }
    })?;
    recorder.map(Recorder::finish).transpose()?;
    let profile = Profile::new(&engine, &generation, started, open_seconds);
    report(args, &request, &generation, &profile, engine.spec().max_positions)?;
    if let Some(file) = &args.profile_svg {
        profile.chart(&engine.spec().family).write(file)?;
    }
    if !args.engine.forget {
        // Counts are a convenience, so a folder that cannot be written is neither an error nor worth a note. Something else in
        // their place is worth a note.
        if let Err(e) = engine.save_counts()
            && e.kind() == io::ErrorKind::AlreadyExists
        {
            note(&format_args!("note: what this run has learned about the experts is not kept: {e}"));
        }
    }
    Ok(())
}

/// Who proposes tokens unless the command says so. A trace has the routing of all rows, and rows of proposals that do not come true are no part
/// of the text.
fn usual_drafts(args: &Args) -> Drafts {
    if args.trace.is_some() { Drafts::Off } else { args.engine.usual_drafts() }
}

/// How tokens are chosen: as requested, else as the model's authors recommend.
fn sampling(args: &Args, file: &ModelFile) -> Result<SamplerConfig, CliError> {
    // Token ids are for programs, which compare them: greedy unless sampling is requested.
    let defaults = || GenerationDefaults::of(file.metadata());
    let recommended = if args.ids { GenerationDefaults::default() } else { defaults()? };
    let sampling = args.sampling.config(&recommended);
    sampling.validate()?;
    for (remark, option) in args.sampling.remarks(&recommended) {
        let overrides = option.map(|option| format!("; {option} overrides it")).unwrap_or_default();
        note(&format_args!("note: {remark}{overrides}"));
    }
    Ok(sampling)
}

fn prepare(args: &Args, file: &ModelFile, given: Given) -> Result<Prepared, CliError> {
    let name = args.file.display();
    let tokenizer = tokenizer(file)?;
    if tokenizer.is_none() && !args.ids && !args.json {
        let ids = match args.prompt_ids {
            Some(_) => "ask for token ids with --ids",
            None => "give token ids with --prompt-ids and ask for ids with --ids",
        };
        return Err(CliError::Usage(format!(
            "{name} has no tokenizer, so it neither reads nor writes text: {ids}, or add a tokenizer with `sluice set {name} \
             --tokenizer FILE`"
        )));
    }
    if tokenizer.is_none() && !args.stop.is_empty() {
        return Err(CliError::Usage(format!("--stop needs a tokenizer, and {name} has none")));
    }
    let mut eos = GenerationDefaults::of(file.metadata())?.eos;
    // Fine-tuned models often name a new end token only in the tokenizer's files.
    eos.extend(tokenizer.as_ref().and_then(Tokenizer::end_token));
    if args.ignore_eos {
        eos.clear();
    }
    let stop = StopCondition::new(eos, args.stop.clone())?;
    let prompt = prompt(args, tokenizer.as_ref(), file, given)?;
    Ok(Prepared { tokenizer, prompt, stop })
}

/// What to do when the context is full.
fn when_full(args: &Args, prompt: usize, context: usize) -> Result<WhenFull, CliError> {
    match (args.when_full, args.keep) {
        (FullChoice::Stop, None) => Ok(WhenFull::Stop),
        (FullChoice::Stop, Some(_)) => {
            Err(CliError::Usage("--keep says what --when-full drop-oldest keeps: give that as well".into()))
        }
        (FullChoice::DropOldest, Some(keep)) if keep >= context => Err(CliError::Usage(format!(
            "--keep {keep} leaves no room in a context of {context} tokens: keep fewer, or raise --context"
        ))),
        (FullChoice::DropOldest, keep) => {
            Ok(WhenFull::DropOldest { keep: keep.unwrap_or_else(|| prompt.min(context / 2)) })
        }
    }
}

/// Generates, and shows the requested output as it arrives.
fn stream(
    args: &Args,
    engine: &mut Engine,
    request: &Request<'_>,
    recorder: Option<&mut Recorder>,
) -> Result<Generation, CliError> {
    let mut first = true;
    generate(engine, request, recorder, &mut |_, id, text| match id {
        _ if args.json => Ok(()),
        Some(id) if args.ids => {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            print_text(&format!("{comma}{id}"))
        }
        _ if args.ids || text.is_empty() => Ok(()),
        _ => print_text(text),
    })
}

/// Prints what follows the text. `limit` is the longest context that the model takes, in tokens.
fn report(
    args: &Args,
    request: &Request<'_>,
    done: &Generation,
    profile: &Profile,
    limit: usize,
) -> Result<(), CliError> {
    if args.json {
        print_json(&json!({
            "text": done.text,
            "ids": done.ids,
            "finish": done.finish,
            "dropped_tokens": done.dropped,
            "prompt_tokens": request.prompt.len(),
            "seed": request.sampling.seed,
            "temperature": json_number(request.sampling.temperature),
            "profile": profile,
        }))?;
    } else {
        print_text("\n")?;
    }
    if done.dropped > 0 {
        let (dropped, context) = (done.dropped, profile.memory.context);
        note(&format_args!(
            "note: the context of {context} tokens was full: of the oldest tokens {dropped} were dropped on the way"
        ));
    }
    if done.finish == Finish::Context {
        let (tokens, context) = (counted(done.ids.len(), "token"), profile.memory.context);
        let advice = if context < limit { "; --context makes it longer" } else { ", which is the model's limit" };
        let advice = format!("{advice}; --when-full drop-oldest goes on");
        note(&format_args!("note: stopped after {tokens} because the context of {context} tokens is full{advice}"));
    }
    if args.profile {
        print_report(profile.report().trim_end());
    }
    Ok(())
}

/// The tokens to continue.
fn prompt(args: &Args, tokenizer: Option<&Tokenizer>, file: &ModelFile, given: Given) -> Result<Vec<u32>, CliError> {
    let ids = match given {
        Given::Ids(ids) => ids,
        Given::Text(text) => {
            let tokenizer = tokenizer.ok_or_else(|| {
                let name = args.file.display();
                CliError::Usage(format!(
                    "{name} has no tokenizer, so it cannot read text: give the prompt as --prompt-ids 1,2,3, or add one with \
                     `sluice set {name} --tokenizer FILE`"
                ))
            })?;
            if args.chat || args.chat_template.is_some() {
                chat(args, tokenizer, file, &text)?
            } else {
                tokenizer.encode(&text, true)?
            }
        }
    };
    if ids.is_empty() {
        return Err(CliError::Usage("the prompt is empty: give at least one token to continue".into()));
    }
    check_ids(&ids, file.spec().vocab_size)?;
    Ok(ids)
}

/// The prompt as a user's message in the chat template. Nothing in it is taken for a control token.
fn chat(args: &Args, tokenizer: &Tokenizer, file: &ModelFile, text: &str) -> Result<Vec<u32>, CliError> {
    let given = args.chat_template.as_deref().map(read_template).transpose()?;
    let name = args.file.display();
    let template = ChatTemplate::find(|name| match &given {
        Some(template) if name == CHAT_TEMPLATE => Some(template.as_slice()),
        _ => file.metadata().get(name),
    });
    let template = template.map_err(|e| match &args.chat_template {
        Some(given) => CliError::Failure(format!("{}: {e}", given.display())),
        None => CliError::Failure(format!(
            "{name}: {e}. To use another template: --chat-template FILE, or for good `sluice set`"
        )),
    })?;
    let template = template.ok_or_else(|| {
        CliError::Usage(format!(
            "{name} has no chat template: give one with --chat-template FILE, or for good with `sluice set {name} \
             --chat-template FILE`; or leave --chat away to continue the text as it is"
        ))
    })?;
    if let Some(given) = &args.chat_template {
        try_out(&template).map_err(|e| CliError::Failure(format!("{}: {e}", given.display())))?;
    }
    let system = args.system.as_deref().map(|text| Message::new("system", text));
    let messages: Vec<_> = system.into_iter().chain([Message::new("user", text.trim_end_matches('\n'))]).collect();
    let ids = encode_chat(tokenizer, &template, &messages, &chat_options())?;
    if ids.is_empty() {
        return Err(CliError::Failure(format!("{name}: the chat template renders nothing of the prompt")));
    }
    Ok(ids)
}

fn given(args: &Args) -> Result<Given, CliError> {
    if let Some(TokenIds(ids)) = &args.prompt_ids {
        return Ok(Given::Ids(ids.clone()));
    }
    if let Some(text) = &args.prompt {
        return Ok(Given::Text(text.clone()));
    }
    if let Some(path) = &args.prompt_file {
        return Ok(Given::Text(read_text(path, "read the prompt")?));
    }
    let stdin = io::stdin().lock();
    if stdin.is_terminal() {
        let message = "there is no prompt: give --prompt TEXT, --prompt-file FILE or --prompt-ids IDS, or pipe text in";
        return Err(CliError::Usage(message.into()));
    }
    let failed = |e| CliError::Failure(format!("cannot read the prompt from standard input: {e}"));
    Ok(Given::Text(text_of(stdin, MAX_TEXT).map_err(failed)?))
}

/// A number of tokens; -1 for as many as there is room for.
fn parse_most(text: &str) -> Result<usize, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(UNLIMITED),
        Ok(n) if n >= 0 => Ok(n as usize),
        _ => Err("write a number of tokens, or -1 for no limit".into()),
    }
}

/// How many tokens the sequence must hold, by the length of the prompt.
struct Room {
    /// `--context`.
    asked: Option<usize>,
    /// Most tokens to generate; with [`UNLIMITED`], as many as there is room for.
    new: usize,
    /// The longest context whose keys and values take at most a quarter of the memory: more would leave too little for experts. Only
    /// looked for where nothing else limits the context.
    roomy: usize,
    /// The most that the model takes.
    limit: usize,
}

impl Room {
    /// Looks at the memory that is available now.
    fn of(args: &Args, file: &ModelFile) -> Room {
        let limit = file.spec().max_positions;
        let roomy = |&context: &usize| {
            let plan = MemoryPlan::new(file, args.engine.budget, Demand::one(context, args.engine.kv_type));
            plan.is_ok_and(|plan| plan.kv_cache <= plan.effective.min(plan.available) / 4)
        };
        let halves = || std::iter::successors(Some(limit), |&n| Some(n / 2)).take_while(|&n| n > USUAL);
        let looks = args.context.is_none() && args.max_tokens == UNLIMITED;
        let roomy = if looks { halves().find(roomy) } else { None };
        Room { asked: args.context, new: args.max_tokens, roomy: roomy.unwrap_or(0), limit }
    }

    /// Tokens of prompt and answer; never fewer for a longer prompt.
    fn context(&self, prompt: usize) -> usize {
        let wanted = match self.asked {
            Some(context) => context,
            // At least as many tokens as are generated by default.
            None if self.new == UNLIMITED => self.roomy.max(prompt.saturating_add(USUAL)),
            None => prompt.saturating_add(self.new),
        };
        wanted.min(self.limit)
    }

    /// As [`context`](Self::context), if that is room for the prompt. Prints a note if it is less than was asked for.
    fn checked(&self, prompt: usize) -> Result<usize, CliError> {
        let Room { asked, limit, .. } = *self;
        if asked.is_some_and(|context| context > limit) {
            note(&format_args!("note: the context is {limit} tokens, the most that the model takes"));
        }
        let context = self.context(prompt);
        if prompt > context {
            return Err(CliError::Usage(match asked {
                Some(context) if context < limit => {
                    format!("the prompt has {prompt} tokens, more than the {context} of --context")
                }
                _ => format!("the prompt has {prompt} tokens, the model takes at most {limit}"),
            }));
        }
        Ok(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_prompt_has_the_shortest_context() {
        let room = |asked, new, roomy| Room { asked, new, roomy, limit: 4096 };
        for (room, contexts) in [
            (room(None, 256, 0), [257, 356, 4096]),
            (room(Some(100), 256, 0), [100, 100, 100]),
            (room(Some(9000), 256, 0), [4096, 4096, 4096]),
            (room(None, UNLIMITED, 2048), [2048, 2048, 4096]),
            (room(None, UNLIMITED, 0), [257, 356, 4096]),
        ] {
            assert_eq!([1, 100, 4000].map(|prompt| room.context(prompt)), contexts);
        }
        let errors = [room(Some(100), 256, 0).checked(101), room(None, 256, 0).checked(4097)];
        let errors = errors.map(|refused| refused.unwrap_err().to_string());
        assert!(errors[0].contains("100 of --context") && errors[1].contains("at most 4096"), "{errors:?}");
    }

    #[test]
    fn numbers_of_tokens() {
        assert_eq!(parse_most("-1"), Ok(UNLIMITED));
        assert_eq!(parse_most("0"), Ok(0));
        for wrong in ["-2", "1.5", "", "all", "99999999999999999999"] {
            assert!(parse_most(wrong).is_err(), "{wrong}");
        }
    }
}
