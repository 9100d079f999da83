//! `sluice batch` and `sluice ask`: killed at random moments, the same command goes on, and the results are the bytes of a run that was
//! left alone.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::common::{assert_fails, demo_model, sluice, stderr, stdout};
use serde_json::{Value, json};

/// Requests of the acceptance test.
const REQUESTS: usize = 200;
/// How often runs are killed. `SLUICE_BATCH_KILLS` asks for more.
const KILLS: usize = 10;
/// Most kills of one run before it is left alone.
const KILLS_OF_A_RUN: usize = 20;

/// The demo model with a template that makes conversations of Shakespeare's kind.
fn model() -> &'static str {
    static MODEL: OnceLock<(tempfile::TempDir, String)> = OnceLock::new();
    let (_, path) = MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.sluice").to_str().unwrap().to_owned();
        fs::copy(demo_model(), &path).unwrap();
        let template = folder.path().join("plain.jinja");
        let text = "{% for m in messages %}{{ m.role | upper }}:{{ \"\\n\" }}{{ m.content }}{{ \"\\n\\n\" }}{% endfor %}ROMEO:{{ \"\\n\" }}";
        fs::write(&template, text).unwrap();
        stdout(&sluice(&["set", &path, "--chat-template", template.to_str().unwrap()]));
        (folder, path)
    });
    path
}

/// Requests of all kinds, some of which fail.
fn requests() -> String {
    let mut lines = Vec::new();
    for number in 0..REQUESTS {
        let id = format!("request-{number}");
        let most = 4 + number * 7 % 30;
        let question = ["Who are you?", "What light is that?", "Speak of love.", "Farewell."][number / 7 % 4];
        let messages = json!([{"role": "system", "content": "Verona. ".repeat(number % 3 * 20)}, {"role": "user", "content": question}]);
        let chat = |more: Value| {
            let mut body = json!({"model": "any", "messages": messages, "max_completion_tokens": most});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body})
        };
        let line = match number % 10 {
            0 => json!({"custom_id": id, "prompt": format!("JULIET:\n{question}"), "max_tokens": most}),
            1 => chat(json!({})),
            2 => chat(json!({"temperature": 1.1})),
            3 => chat(json!({"temperature": 0.9, "n": 3, "stop": ["e"]})),
            4 => chat(json!({"temperature": 1.0, "logprobs": true, "top_logprobs": 3, "frequency_penalty": 0.7})),
            5 => json!({"custom_id": id, "method": "POST", "url": "/v1/responses",
                        "body": {"input": question, "max_output_tokens": most, "temperature": 1.0}}),
            6 => json!({"custom_id": id, "method": "POST", "url": "/v1/completions",
                        "body": {"prompt": ["A", "B"], "max_tokens": most, "temperature": 1.3, "logprobs": 1, "echo": number % 20 == 6}}),
            7 => chat(
                json!({"seed": 5, "temperature": 1.0, "response_format": {"type": "regex", "regex": "[a-z ]{3,40}"}}),
            ),
            8 if number % 40 == 8 => json!({"custom_id": id, "method": "POST", "url": "/v1/embeddings", "body": {}}),
            8 => chat(json!({"temperature": 1.0, "presence_penalty": 1.5})),
            _ if number % 50 == 9 => chat(json!({"temperature": 9})),
            _ => json!({"prompt": question, "max_tokens": most}),
        };
        lines.push(line.to_string());
    }
    // One that is none; 5 ask for embeddings, and 4 want it too hot.
    lines.insert(100, "not JSON".to_owned());
    lines.join("\n")
}

/// Of 201 lines.
const FAILED: usize = 1 + 5 + 4;

struct Run {
    _folder: tempfile::TempDir,
    input: PathBuf,
    output: PathBuf,
}

impl Run {
    fn new(requests: &str) -> Run {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
        fs::write(&input, requests).unwrap();
        Run { _folder: folder, input, output }
    }

    fn args<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["batch", model(), self.input.to_str().unwrap(), self.output.to_str().unwrap()];
        args.extend(["--sequences", "8", "--forget", "--threads", "2"]);
        args.extend(more);
        args
    }

    fn journal(&self) -> PathBuf {
        self.output.with_file_name("out.jsonl.journal")
    }

    /// Files beside the input.
    fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.input.parent().unwrap()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "in.jsonl").collect()
    }

    fn spawn(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(self.args(&[])).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Results by name, none of which may be there twice.
    fn results(&self) -> BTreeMap<String, String> {
        results(&self.output)
    }
}

fn results(output: &Path) -> BTreeMap<String, String> {
    let mut results = BTreeMap::new();
    for line in fs::read_to_string(output).unwrap().lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        let id = value["custom_id"].as_str().unwrap().to_owned();
        assert_eq!(results.insert(id.clone(), line.to_owned()), None, "{id} is there twice");
    }
    results
}

/// What a run that is left alone gives, and how long it takes.
fn reference() -> &'static (BTreeMap<String, String>, Duration) {
    static REFERENCE: OnceLock<(BTreeMap<String, String>, Duration)> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        let run = Run::new(&requests());
        let began = Instant::now();
        let done = sluice(&run.args(&[]));
        assert_fails(&done, 3, &["10 of 201 requests failed"]);
        (run.results(), began.elapsed())
    })
}

#[test]
fn killed_at_random_it_goes_on_to_the_same_bytes() {
    let kills = std::env::var("SLUICE_BATCH_KILLS").map_or(KILLS, |n| n.parse().unwrap());
    let (want, whole) = reference();
    assert_eq!(want.len(), REQUESTS + 1);
    let mut random: u64 = 42;
    let (mut killed, mut began_again) = (0, 0);
    while killed < kills {
        let run = Run::new(&requests());
        let mut killed_here = 0;
        let status = loop {
            let mut child = run.spawn();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let part = (random >> 33) as f64 / (1_u64 << 31) as f64;
            if killed < kills && killed_here < KILLS_OF_A_RUN {
                std::thread::sleep(whole.mul_f64(0.6 * part));
                // One that has ended by itself cannot be killed.
                let _ = child.kill();
            }
            let done = child.wait_with_output().unwrap();
            match done.status.signal() {
                Some(9) => (killed, killed_here) = (killed + 1, killed_here + 1),
                _ => break done,
            }
        };
        assert_fails(&status, 3, &["10 of 201 requests failed"]);
        began_again += usize::from(killed_here > 0);
        let got = run.results();
        assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
        for (id, line) in &got {
            assert_eq!(line, &want[id], "{id}");
        }
    }
    assert!(began_again > 0);
}

#[test]
fn results_have_the_form_of_openai_and_say_what_is_wrong() {
    let (results, _) = reference();
    let parse = |id: &str| serde_json::from_str::<Value>(&results[id]).unwrap();
    let failed = results.values().filter(|line| !serde_json::from_str::<Value>(line).unwrap()["error"].is_null());
    assert_eq!(failed.count(), FAILED);
    let chat = parse("request-1");
    assert_eq!((&chat["error"], &chat["response"]["status_code"]), (&Value::Null, &json!(200)));
    assert!(chat["id"].as_str().unwrap().starts_with("batch_req_"));
    let body = &chat["response"]["body"];
    assert_eq!((body["object"].as_str(), body["created"].as_u64()), (Some("chat.completion"), Some(0)));
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(!body["choices"][0]["message"]["content"].as_str().unwrap().is_empty());
    let three = parse("request-3");
    let choices = three["response"]["body"]["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    assert!(choices.iter().all(|choice| !choice["message"]["content"].as_str().unwrap().contains('e')));
    assert_ne!(choices[0]["message"], choices[1]["message"], "answers have seeds of their own");
    let scored = &parse("request-4")["response"]["body"]["choices"][0]["logprobs"]["content"];
    assert_eq!(scored[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(parse("request-5")["response"]["body"]["object"], "response");
    assert_eq!(parse("request-6")["response"]["body"]["choices"].as_array().unwrap().len(), 2);
    let unknown = parse("request-8");
    assert_eq!(
        (unknown["response"]["status_code"].as_u64(), unknown["error"]["code"].as_str()),
        (Some(404), Some("invalid_url"))
    );
    assert_eq!(parse("request-9")["error"]["code"], "invalid_value");
    assert_eq!(parse("line-101")["error"]["code"], "invalid_json");
    let plain = parse("line-20");
    assert_eq!(plain["response"]["body"]["object"], "text_completion");
}

#[test]
fn answers_do_not_depend_on_the_others() {
    let (results, _) = reference();
    let lines: Vec<String> = requests().lines().map(str::to_owned).collect();
    // The same requests in another order, a few of them, one at a time, with little memory.
    let chosen: Vec<&str> = [57, 4, 33, 12].iter().map(|&at| lines[at].as_str()).collect();
    let run = Run::new(&chosen.join("\n"));
    let mut args = vec!["batch", model(), run.input.to_str().unwrap(), run.output.to_str().unwrap()];
    args.extend(["--sequences", "1", "--context", "1000", "--no-prefetch", "--forget"]);
    stdout(&sluice(&args));
    for (id, line) in run.results() {
        assert_eq!(line, results[&id], "{id}");
    }
}

#[test]
fn interrupted_it_says_how_to_go_on() {
    let long = json!({"prompt": "ROMEO:", "max_tokens": 200, "temperature": 1.0}).to_string();
    let run = Run::new(&format!("{long}\n").repeat(500));
    let child = run.spawn();
    let began = Instant::now();
    // Until something is kept: the header of a journal is shorter.
    let kept = || run.journal().metadata().is_ok_and(|journal| journal.len() > 1000);
    while !kept() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let done = child.wait_with_output().unwrap();
    assert_fails(&done, 130, &["interrupted", "The same command goes on"]);
}

/// Most memory that a process has had, in KiB.
#[cfg(target_os = "linux")]
fn peak_memory(child: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn ten_thousand_requests_take_no_more_memory_than_a_hundred() {
    let peak = |count: usize| {
        // Most of a line is nothing to the model, but it has to be read.
        let line = |number: usize| {
            json!({"prompt": format!("{number}"), "max_tokens": 100, "user": "x".repeat(2500)}).to_string() + "\n"
        };
        let requests: String = (0..count).map(line).collect();
        let run = Run::new(&requests);
        let mut child = run.spawn();
        let began = Instant::now();
        // Until some are answered.
        let answered = || fs::read_to_string(&run.output).is_ok_and(|text| text.lines().count() >= 4);
        while !answered() && began.elapsed() < Duration::from_secs(300) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let peak = peak_memory(&child);
        child.kill().unwrap();
        child.wait().unwrap();
        (peak, requests.len() as u64 / 1024)
    };
    let ((few, _), (many, input)) = (peak(100), peak(10_000));
    assert!(input > 20_000, "an input of {input} KiB");
    assert!(many < few + 8_000, "{many} KiB with 10000 requests, {few} with 100");
}

#[test]
fn what_a_run_does_not_belong_to_is_refused() {
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 2}\n");
    stdout(&sluice(&run.args(&[])));
    let before = fs::read(&run.output).unwrap();
    // All is done: nothing happens.
    stdout(&sluice(&run.args(&[])));
    assert_eq!(fs::read(&run.output).unwrap(), before);
    assert_fails(&sluice(&run.args(&["--context", "300"])), 2, &["other settings", "--context 300"]);
    let mut args = run.args(&[]);
    args[1] = demo_model();
    assert_fails(&sluice(&args), 2, &["other settings"]);
    fs::write(&run.input, "{\"prompt\": \"B\", \"max_tokens\": 2}\n").unwrap();
    assert_fails(&sluice(&run.args(&[])), 2, &["the requests are others"]);

    let run = Run::new("{\"prompt\": \"A\"}\n{\"custom_id\": \"line-1\", \"prompt\": \"B\"}\n");
    assert_fails(&sluice(&run.args(&[])), 2, &["lines 1 and 2", "line-1"]);
    fs::write(&run.output, "mine\n").unwrap();
    fs::write(&run.input, "{\"prompt\": \"A\"}\n").unwrap();
    assert_fails(&sluice(&run.args(&[])), 2, &["there is a file already"]);
    assert_eq!(fs::read(&run.output).unwrap(), b"mine\n");
    let args = ["batch", model(), run.input.to_str().unwrap(), run.input.to_str().unwrap()];
    assert_fails(&sluice(&args), 2, &["is a file that is read"]);
}

#[test]
fn a_run_chooses_how_many_answers_it_makes_at_a_time() {
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 2}\n");
    let done =
        sluice(&["batch", model(), run.input.to_str().unwrap(), run.output.to_str().unwrap(), "--no-calibration"]);
    assert!(done.status.success() && stderr(&done).contains("1 at a time"), "{}", stderr(&done));
    assert_eq!(run.results().len(), 1);
}

#[test]
fn nothing_to_go_on_with_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("answer.md");
    let resume = || sluice(&["ask", model(), "--resume", "--out", out.to_str().unwrap()]);
    assert_fails(&resume(), 2, &["there is nothing to go on with"]);
    fs::create_dir(folder.path().join("answer.md.run")).unwrap();
    assert_fails(&resume(), 2, &["there is nothing to go on with", "no question"]);
    fs::remove_dir(folder.path().join("answer.md.run")).unwrap();
    fs::write(&out, "42").unwrap();
    let done = resume();
    assert!(done.status.success() && stderr(&done).contains("nothing is left to do"), "{}", stderr(&done));
    assert_eq!(fs::read(&out).unwrap(), b"42");
}

#[test]
fn fewer_experts_are_said_with_each_result_and_not_mixed_with_all() {
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 2}\n");
    let with = |more: &[&'static str]| {
        let mut args = run.args(more);
        args[1] = demo_model();
        sluice(&args)
    };
    stdout(&with(&["--top-k-experts", "1"]));
    let result: Value = serde_json::from_str(&run.results()["line-1"]).unwrap();
    assert_eq!(result["lossy"], "at most 1 expert per token and layer");
    assert_fails(&with(&[]), 2, &["other settings", "at most 1 expert"]);
    assert_fails(&with(&["--expert-preference", "0.5"]), 2, &["--expert-preference", "after an interruption"]);
    let other = Run::new("{\"prompt\": \"A\", \"max_tokens\": 2}\n");
    let mut args = other.args(&["--kv-type", "q8"]);
    args[1] = demo_model();
    stdout(&sluice(&args));
    let result: Value = serde_json::from_str(&other.results()["line-1"]).unwrap();
    assert_eq!(result["lossy"], "keys and values are rounded to q8");
}

#[test]
fn the_form_of_prompts_is_said_with_each_result_and_not_mixed() {
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 2}\n");
    let with = |more: &[&'static str]| {
        let mut args = run.args(more);
        args[1] = demo_model();
        sluice(&args)
    };
    stdout(&with(&["--prompt-attention", "expanded"]));
    let result: Value = serde_json::from_str(&run.results()["line-1"]).unwrap();
    assert_eq!(result["prompt_attention"], "expanded");
    assert_fails(&with(&[]), 2, &["other settings", "--prompt-attention expanded"]);
}

#[test]
fn progress_and_plan_are_there_for_programs() {
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 20}\n{\"prompt\": \"B\", \"max_tokens\": 20}\n");
    let done = sluice(&run.args(&["--json"]));
    let events: Vec<Value> = stdout(&done).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((events[0]["event"].as_str(), events[0]["plan"]["sequences"].as_u64()), (Some("begin"), Some(8)));
    let last = &events[events.len() - 1];
    assert_eq!((last["event"].as_str(), last["state"]["finished"].as_u64()), (Some("end"), Some(2)));
    assert!(events.iter().any(|event| event["event"] == "progress" && event["progress"]["requests"] == 2));
    // A run that begins is not interrupted.
    assert_eq!(events[0]["state"], json!({"requests": 2, "finished": 0, "failed": 0}));
    assert_eq!(events[0]["plan"]["load"]["answer_tokens"].as_f64(), Some(40.0));
    // The other stream for programs has the same events.
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 20}\n");
    let done = sluice(&run.args(&["--progress", "json"]));
    let events: Vec<Value> = stderr(&done).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().any(|event| event["event"] == "progress" && event["progress"]["requests"] == 1));

    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 20}\nnonsense\n");
    let plan = sluice(&run.args(&["--dry-run"]));
    // It ends as the run would.
    assert_fails(&plan, 3, &["exit code 3", "1 request"]);
    let text = String::from_utf8(plan.stdout).unwrap();
    for word in [
        "1 answer to give",
        " to read, and ",
        "at most 20 to generate",
        "drive",
        "memory",
        "arithmetic",
        "tokens/s at most",
        "\nexpected ",
        "\nbound     at least",
        "1 request cannot be answered, and will fail:\n  line 2 is not JSON",
    ] {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert_eq!(run.files(), [""; 0]);
}

#[test]
fn a_plan_leaves_out_what_is_done_and_names_what_cannot_be_answered() {
    let line = |id: &str, more: &str| format!(r#"{{"custom_id": "{id}", "prompt": "ROMEO:", "max_tokens": 40{more}}}"#);
    let requests = [
        line("short", r#", "stop": ["e"]"#),
        line("hot", r#", "temperature": 9"#),
        line("long", r#", "seed": 1"#),
        r#"{"custom_id": "where", "method": "POST", "url": "/v1/nowhere", "body": {}}"#.to_owned(),
        format!(r#"{{"custom_id": "much", "prompt": "{}"}}"#, "many words ".repeat(2000)),
    ];
    let run = Run::new(&requests.join("\n"));
    let plan = |more: &[&'static str]| {
        let mut args = run.args(&["--dry-run", "--json", "--context", "512"]);
        args.extend(more);
        let dry = sluice(&args);
        assert_fails(&dry, 3, &["exit code 3", "3 requests"]);
        let said = String::from_utf8(dry.stdout).unwrap();
        serde_json::from_str::<Value>(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
    };
    let whole = plan(&[]);
    assert_eq!((whole["load"]["answers"].as_u64(), whole["rest"]["wrong"].as_u64()), (Some(2), Some(3)));
    assert_eq!(whole["load"]["answer_tokens"].as_f64(), Some(80.0));
    let wrong: Vec<_> = whole["rest"]["wrong_requests"].as_array().unwrap().iter().collect();
    let named = |at: usize| (wrong[at]["line"].as_u64().unwrap(), wrong[at]["custom_id"].as_str().unwrap());
    let mut all: Vec<_> = (0..3).map(named).collect();
    all.sort_unstable();
    assert_eq!(all, [(2, "hot"), (4, "where"), (5, "much")]);
    let [least, expected, longest] =
        ["least_seconds", "expected_seconds", "longest_seconds"].map(|name| whole[name].as_f64().unwrap());
    assert!(0.0 < least && 0.0 < expected && expected <= longest, "{whole}");
    assert_eq!(run.files(), [""; 0]);

    // All that can be answered is answered, and the run plans for the same.
    let done = sluice(&run.args(&["--context", "512", "--json"]));
    assert_fails(&done, 3, &["3 of 5 requests failed", "failed: line 2, custom_id \"hot\": "]);
    let begin =
        String::from_utf8(done.stdout).unwrap().lines().next().map(serde_json::from_str::<Value>).unwrap().unwrap();
    assert_eq!((&begin["plan"]["load"], &begin["plan"]["rest"]), (&whole["load"], &whole["rest"]));
    let rest = plan(&[]);
    assert_eq!((rest["load"]["answers"].as_u64(), rest["rest"]["finished"].as_u64()), (Some(0), Some(5)));
    assert_eq!(rest["rest"]["failed"], 3);
    // Answers so far say how long others will be.
    let mean = rest["rest"]["mean_answer"].as_f64().unwrap();
    assert!(mean > 0.0 && mean <= 40.0, "{mean}");
    let kept = fs::read(&run.output).unwrap();
    let first = kept.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    fs::write(&run.output, &kept[..first]).unwrap();
    let rest = plan(&[]);
    assert_eq!(rest["rest"]["finished"], 1);
    assert_eq!(fs::read(&run.output).unwrap().len(), first, "a plan changes nothing");
    assert_fails(&sluice(&run.args(&["--dry-run", "--context", "300"])), 2, &["other settings"]);
}

#[test]
fn a_run_and_a_dry_run_say_the_same_of_the_machine_and_of_the_folder() {
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 3}\n");
    let place =
        ["batch", model(), run.input.to_str().unwrap(), run.output.to_str().unwrap(), "--forget", "--threads", "2"];
    let plan = |more: &[&'static str]| {
        let said = stdout(&sluice(&[&place[..], more].concat()));
        serde_json::from_str::<Value>(said.lines().next().unwrap()).unwrap()
    };
    let (dry, begin) = (plan(&["--dry-run", "--json"]), plan(&["--json"]));
    for name in ["machine", "step", "expected", "expected_seconds", "expected_seconds_range", "least_seconds"] {
        assert!(!dry[name].is_null() && !begin["plan"][name].is_null(), "{name} is missing: {dry}, {begin}");
    }
    // Where the number of answers was asked for, nothing is measured, and nothing is said of the time but how to know it.
    let other = Run::new("{\"prompt\": \"A\", \"max_tokens\": 3}\n");
    let said = stderr(&sluice(&other.args(&[])));
    assert!(said.contains("--dry-run measures the machine") && !said.contains("expected"), "{said}");

    let nowhere = run.input.with_file_name("nowhere").join("out.jsonl");
    let args = ["batch", model(), run.input.to_str().unwrap(), nowhere.to_str().unwrap()];
    let dry = sluice(&[&args[..], &["--dry-run"]].concat());
    assert_fails(&dry, 1, &["out.jsonl", "nowhere", "Make it"]);
    assert_eq!(stderr(&dry), stderr(&sluice(&args)));
    assert!(!nowhere.parent().unwrap().exists());
    let within = run.input.join("out.jsonl");
    let args = ["batch", model(), run.input.to_str().unwrap(), within.to_str().unwrap(), "--dry-run"];
    assert_fails(&sluice(&args), 1, &["is no folder"]);
}

#[test]
fn a_refusal_leaves_nothing_behind_that_would_bind_the_next_run() {
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 2}\n");
    let saved = ["--save-sequences", "always"];
    let with = |more: &[&'static str]| sluice(&run.args(&[&saved[..], more].concat()));
    assert_fails(&with(&["--budget", "100KiB", "--context", "300"]), 1, &["the budget of", "raise --budget"]);
    assert_eq!(run.files(), [""; 0]);
    // What shows only when the model is opened: the damaged dense part that the first step needs.
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.sluice");
    let mut bytes = fs::read(demo_model()).unwrap();
    let plan: Value =
        serde_json::from_str(&stdout(&sluice(&["inspect", demo_model(), "--json", "--extents"]))).unwrap();
    let head = plan["extents"].as_array().unwrap().iter().find(|extent| extent["kind"] == "head").unwrap();
    bytes[head["offset"].as_u64().unwrap() as usize + 5] ^= 1;
    fs::write(&broken, bytes).unwrap();
    let mut args = run.args(&saved);
    args[1] = broken.to_str().unwrap();
    assert_fails(&sluice(&args), 1, &["damaged"]);
    assert_eq!(run.files(), [""; 0]);
    stdout(&with(&[]));
    assert_eq!(run.files().len(), 2, "{:?}", run.files());

    let out = folder.path().join("answer.md");
    let ask = ["ask", model(), "Who?", "--overnight", "--out", out.to_str().unwrap(), "--budget", "100KiB"];
    assert_fails(&sluice(&ask), 1, &["the budget of"]);
    assert!(!folder.path().join("answer.md.run").exists());
}

#[test]
fn what_a_plan_assumes_and_what_it_ignores_is_said() {
    let chat = r#"{"messages": [{"role": "user", "content": "A"}], "max_token": 5}"#;
    let run = Run::new(&format!("{chat}\n{}\n", r#"{"prompt": "B", "temprature": 1, "user": "me"}"#));
    let plan = sluice(&run.args(&["--dry-run"]));
    let text = stdout(&plan);
    assert!(text.contains("an answer has no limit: 1024 are assumed") && !text.contains("at most 1280"), "{text}");
    let said = stderr(&plan);
    for word in [
        r#"the field "max_token" is not known"#,
        " line 1 is ",
        r#"Did you mean "max_tokens"?"#,
        "temprature",
        " line 2 is ",
    ] {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
    assert!(!said.contains("\"user\""), "{said}");
}

/// Requests with prompts of some hundred tokens.
fn long_prompts() -> String {
    let request = |number: usize| {
        let prompt = format!("ROMEO:\nLetter {number} of many. {}", "O, speak again, bright angel! ".repeat(12));
        json!({"prompt": prompt, "max_tokens": 150, "temperature": 1.0}).to_string()
    };
    (0..24).map(request).collect::<Vec<_>>().join("\n")
}

/// Files of saved sequences.
fn saved(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).into_iter().flatten().map(|file| file.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|end| end == "session")).collect()
}

/// A run that was told to end, once it has saved sequences in the folder.
fn told_to_end(run: &Run) -> PathBuf {
    let folder = run.output.with_file_name("out.jsonl.sessions");
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(run.args(&["--save-sequences", "always"])).stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while saved(&folder).is_empty() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_fails(&child.wait_with_output().unwrap(), 130, &["interrupted"]);
    assert!(!saved(&folder).is_empty());
    folder
}

#[test]
fn a_run_that_goes_on_does_not_read_again_what_is_saved() {
    let want = Run::new(&long_prompts());
    stdout(&sluice(&want.args(&["--save-sequences", "never"])));
    assert!(!want.output.with_file_name("out.jsonl.sessions").exists());

    let run = Run::new(&long_prompts());
    let folder = told_to_end(&run);
    let events = stdout(&sluice(&run.args(&["--save-sequences", "always", "--json"])));
    let last = events.lines().rfind(|line| line.contains("\"progress\"")).unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert!(last["restored_tokens"].as_u64().unwrap() > 0, "{last}");
    assert_eq!(run.results(), want.results());
    assert!(!folder.exists(), "nobody needs it any more");
    // Neither where the run that ends saves none.
    let run = Run::new(&long_prompts());
    let folder = told_to_end(&run);
    stdout(&sluice(&run.args(&["--save-sequences", "never"])));
    assert_eq!(run.results(), want.results());
    assert!(!folder.exists(), "what an earlier run has saved");

    // What is damaged is left out, and said.
    let run = Run::new(&long_prompts());
    let folder = told_to_end(&run);
    for path in saved(&folder) {
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(&path, bytes).unwrap();
    }
    fs::write(folder.join("0123456789abcdef0123456789abcdef.session"), "").unwrap();
    let done = sluice(&run.args(&["--save-sequences", "always"]));
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(stderr(&done).contains("1 saved sequence in"), "{}", stderr(&done));
    assert!(stderr(&done).contains("could not be read back"), "{}", stderr(&done));
    assert_eq!(run.results(), want.results());
    assert!(!folder.exists());
    // A folder that cannot be used is no obstacle.
    let run = Run::new("{\"prompt\": \"A\", \"max_tokens\": 2}\n");
    fs::write(run.output.with_file_name("out.jsonl.sessions"), "mine").unwrap();
    let done = sluice(&run.args(&["--save-sequences", "always"]));
    assert!(done.status.success() && stderr(&done).contains("Sequences are not saved"), "{}", stderr(&done));
}

#[test]
fn a_question_goes_on_behind_its_saved_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("answer.md").to_str().unwrap().to_owned();
    let question = "O, speak again, bright angel! ".repeat(20);
    let usual = ["-n", "400", "--temperature", "1"];
    let shared = ["--context", "2000", "--forget"];
    let at_once = stdout(&sluice(&[&["ask", model(), &question][..], &usual, &shared].concat()));
    let night = ["--overnight", "--out", &out, "--save-sequences", "always"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args([&["ask", model(), &question][..], &usual, &shared, &night].concat());
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Behind the prompt: what is saved then has tokens of the answer.
    let sessions = folder.path().join("answer.md.run/result.jsonl.sessions");
    let began = Instant::now();
    while !Path::new(&out).exists() && child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(60)
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    if child.wait().unwrap().code() == Some(130) {
        assert!(!saved(&sessions).is_empty());
        stdout(&sluice(&[&["ask", model(), "--resume", "--out", &out][..], &shared].concat()));
    }
    assert_eq!(fs::read_to_string(&out).unwrap().trim(), at_once.trim());
    assert!(!folder.path().join("answer.md.run").exists());
}

#[test]
fn a_limit_on_the_size_of_files_is_an_error_like_a_full_drive() {
    let run = Run::new(&requests());
    let limited = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_sluice")]).args(run.args(&[]));
        command.stdin(Stdio::null()).output().unwrap()
    };
    let done = limited("ulimit -f 4; exec \"$0\" \"$@\"");
    assert_fails(&done, 1, &["File too large", "Nothing is lost"]);
    assert_fails(&sluice(&run.args(&[])), 3, &["10 of 201 requests failed"]);
    assert_eq!(run.results(), reference().0);
}

#[test]
fn questions_that_make_no_sense_are_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("answer.md");
    let ask =
        |model: &str, question: &str| sluice(&["ask", model, question, "--overnight", "--out", out.to_str().unwrap()]);
    assert_fails(&ask(model(), " \n"), 2, &["the question is empty"]);
    assert_fails(&ask(demo_model(), "Who are you?"), 2, &["has no chat template", "sluice run"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_question_is_answered_once_and_survives() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("answer.md");
    let out = out.to_str().unwrap();
    let ask = |more: &[&str]| {
        let mut args = vec!["ask", model()];
        args.extend(more);
        args.extend(["--context", "2000", "--forget"]);
        sluice(&args)
    };
    let at_once = stdout(&ask(&["Who are you?", "-n", "400", "--temperature", "1"]));
    let night = ["Who are you?", "-n", "400", "--temperature", "1", "--overnight", "--out", out];
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.arg("ask").arg(model()).args(night).args(["--context", "2000", "--forget"]);
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while !Path::new(out).exists() && child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let killed = child.wait().unwrap().signal() == Some(9);
    if killed {
        if let Ok(so_far) = fs::read_to_string(out) {
            assert!(at_once.trim_start().starts_with(so_far.trim()) && !so_far.trim().is_empty());
        }
        let other = ask(&["Another one?", "--overnight", "--out", out]);
        assert_fails(&other, 2, &["belongs to another question"]);
        stdout(&ask(&["--resume", "--out", out]));
    }
    assert_eq!(fs::read_to_string(out).unwrap().trim(), at_once.trim());
    assert!(!folder.path().join("answer.md.run").exists());
    assert_fails(&ask(&night), 2, &["is there already"]);
    assert!(stderr(&ask(&["--resume", "--out", out])).contains("nothing is left to do"));
    let wrong = ask(&["Hot?", "--temperature", "7"]);
    assert_fails(&wrong, 3, &["temperature"]);
    assert!(!stderr(&wrong).contains("lost"));
}
