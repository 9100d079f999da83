//! What is found out about a model's text files at `convert`, and how it is mended: `sluice set`, `run --chat-template`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assert_fails, copy_checkpoint, demo_checkpoint, demo_model, json, sluice, stderr, stdout};
use serde_json::{Value, json};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";

/// Files by name, with their new content, or without any.
type Files<'a> = &'a [(&'a str, Option<&'a str>)];

/// A folder with the demo checkpoint, some of whose files are replaced or, with `None`, missing.
fn checkpoint(folder: &Path, files: Files<'_>) -> PathBuf {
    let source = folder.join("checkpoint");
    let _ = fs::remove_dir_all(&source);
    copy_checkpoint(&source, None);
    for (name, content) in files {
        match content {
            Some(content) => fs::write(source.join(name), content).unwrap(),
            None => fs::remove_file(source.join(name)).unwrap(),
        }
    }
    source
}

/// Converts it; returns the model file, and what was said on the way.
fn convert(folder: &Path, files: Files<'_>) -> (String, String) {
    let model = folder.join("m.sluice").to_str().unwrap().to_owned();
    let output = sluice(&["convert", checkpoint(folder, files).to_str().unwrap(), &model, "--overwrite"]);
    stdout(&output);
    (model, stderr(&output))
}

/// A copy of the demo model that may be changed.
fn copy_of_demo(folder: &Path) -> String {
    let copy = folder.join("copy.sluice");
    fs::copy(demo_model(), &copy).unwrap();
    copy.to_str().unwrap().to_owned()
}

fn write(folder: &Path, name: &str, content: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The ids of a short greedy run, and how many tokens the prompt had.
fn run(model: &str, args: &[&str]) -> (Value, Value) {
    let report =
        json(&sluice(&[&["run", model, "-n", "4", "--temperature", "0", "--json", "--forget"], args].concat()));
    (report["ids"].clone(), report["prompt_tokens"].clone())
}

#[test]
fn convert_says_what_run_would_find() {
    let folder = tempfile::tempdir().unwrap();
    let no_json = ("tokenizer.json", None);
    let broken = "{% for m in messages %}{{ m.content }";
    let named = r#"{"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]}"#;
    let no_token = r#"{"eos_token_id": 5000000}"#;
    let cases: [(Files<'_>, &[&str]); 13] = [
        (&[no_json], &["no tokenizer", "m.sluice --tokenizer FILE"]),
        (
            &[no_json, ("vocab.json", Some("{}")), ("merges.txt", Some("x"))],
            &["vocab.json + merges.txt cannot be read"],
        ),
        (&[no_json, ("tokenizer.model", Some("\n"))], &["tokenizer.model cannot be read", "save_pretrained"]),
        (&[no_json, ("tekken.json", Some("{}"))], &["tekken.json cannot be read"]),
        (&[], &["no chat template", "run --chat-template FILE", "m.sluice --chat-template FILE"]),
        (&[("chat_template.jinja", Some(broken))], &["`run --chat` will not work", "line 1", "--chat-template FILE"]),
        (&[("chat_template.jinja", Some("{{ raise_exception('no') }}"))], &["`run --chat` will not work", "no"]),
        (&[("tokenizer_config.json", Some(named))], &["`run --chat` will not work", "chat_template"]),
        (&[("chat_template.jinja", Some(""))], &["`run --chat` will not work", "renders nothing"]),
        (&[("chat_template.jinja", Some("constant"))], &["`run --chat` will not work", "the user's message"]),
        (&[("chat_template.json", Some(r#"{"chat_template": "x"}"#))], &["`run --chat` will not work", "the user's"]),
        (&[("generation_config.json", Some(no_token))], &["5000000", "eos_token_id"]),
        (
            &[("generation_config.json", Some(r#"{"top_p": 1.2}"#))],
            &["generation_config.json", "top_p 1.2", "1 is used"],
        ),
    ];
    for (files, words) in cases {
        let (_, said) = convert(folder.path(), files);
        assert!(said.starts_with("note: "), "{said}");
        for word in words {
            assert!(said.contains(word), "`{word}` is not in: {said}");
        }
    }
    let (_, said) = convert(folder.path(), &[("chat_template.jinja", Some(TEMPLATE))]);
    assert_eq!(said, "");
    let json = json!({ "chat_template": TEMPLATE }).to_string();
    let (model, said) = convert(folder.path(), &[("chat_template.json", Some(&json))]);
    assert_eq!(said, "");
    assert_eq!(run(&model, &["--chat", "--prompt", "Hello"]), run(&model, &["--prompt", "user: Hello\n"]));
    // What cannot be mended by a note: a model that would never stop, and files that are damaged.
    for (name, content, word) in [
        ("generation_config.json", r#"{"eos_token_id": "two"}"#, "eos_token_id"),
        ("generation_config.json", "{", "generation_config.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
    ] {
        let source = checkpoint(folder.path(), &[(name, Some(content))]);
        let target = folder.path().join("refused.sluice");
        let args = ["convert", source.to_str().unwrap(), target.to_str().unwrap()];
        assert_fails(&sluice(&args), 1, &[word]);
        assert!(!target.exists());
    }
}

#[test]
fn convert_refuses_types_that_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.sluice");
    let source = demo_checkpoint();
    let convert = |args: &[&str]| {
        let fixed = ["convert", source.to_str().unwrap(), target.to_str().unwrap(), "--dry-run"];
        sluice(&[&fixed, args].concat())
    };
    let imatrix = folder.path().join("imatrix");
    let text = write(folder.path(), "text", "To be, or not to be, that is the question.");
    stdout(&sluice(&["calibrate", demo_model(), "--text", &text, "--out", imatrix.to_str().unwrap()]));
    let imatrix = imatrix.to_str().unwrap();
    assert_fails(&convert(&["--imatrix", imatrix]), 2, &["--imatrix", "q4, q3 and q2"]);
    assert_fails(&convert(&["--imatrix", imatrix, "--type", "q8"]), 2, &["--imatrix", "q4, q3 and q2"]);
    stdout(&convert(&["--imatrix", imatrix, "--type", "q3"]));

    // The same shape without experts: every layer dense.
    let dense = folder.path().join("dense");
    let config = json!({
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 8,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
        "tie_word_embeddings": true
    });
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let mut tensors =
        vec![("model.embed_tokens.weight".to_owned(), vec![8, 32]), ("model.norm.weight".into(), vec![32])];
    tensors.extend(
        ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
            .map(|n| (layer(n), vec![32])),
    );
    let square = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    tensors.extend(square.map(|n| (layer(n), vec![32, 32])));
    write_checkpoint(&dense, &config, &tensors);
    let convert = |args: &[&str]| {
        let fixed = ["convert", dense.to_str().unwrap(), target.to_str().unwrap(), "--dry-run"];
        sluice(&[&fixed, args].concat())
    };
    assert_fails(&convert(&["--type", "q4"]), 2, &["--type q4", "no", "--dense-type q4"]);
    let both = convert(&["--type", "q4", "--dense-type", "q8"]);
    stdout(&both);
    assert!(stderr(&both).contains("--type q4 changes nothing"), "{}", stderr(&both));
    stdout(&convert(&["--type", "keep"]));
}

/// A checkpoint of one file of f32 zeros.
fn write_checkpoint(folder: &Path, config: &Value, tensors: &[(String, Vec<usize>)]) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    fs::create_dir_all(folder).unwrap();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_slice(), &vec![0; end]].concat();
    fs::write(folder.join("model.safetensors"), file).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_tokenizer_is_added_without_converting_again() {
    let folder = tempfile::tempdir().unwrap();
    let (model, _) = convert(folder.path(), &[("tokenizer.json", None)]);
    assert_fails(&sluice(&["run", &model, "--prompt", "a"]), 2, &["no tokenizer", "sluice set", "--tokenizer"]);
    let before = fs::read(&model).unwrap();
    let inspected = json(&sluice(&["inspect", &model, "--json", "--extents"]));

    let source = demo_checkpoint();
    let tokenizer = source.join("tokenizer.json");
    let set = json(&sluice(&["set", &model, "--tokenizer", tokenizer.to_str().unwrap(), "--json"]));
    assert_eq!(set["replaced"], json!(["tokenizer.json"]));
    assert_ne!(set["state_id"], inspected["state_id"], "another tokenizer is another text");
    let after = json(&sluice(&["inspect", &model, "--json", "--extents"]));
    assert_eq!(after["extents"], inspected["extents"]);
    assert_eq!((&after["model_id"], &after["state_id"]), (&set["model_id"], &set["state_id"]));
    let end = inspected["extents"].as_array().unwrap().last().unwrap();
    let end = (end["offset"].as_u64().unwrap() + end["stored_bytes"].as_u64().unwrap()) as usize;
    assert!(fs::read(&model).unwrap()[4096..end] == before[4096..end]);
    assert_eq!(json(&sluice(&["verify", &model, "--json"]))["intact"], true);

    // The same file as if it had been there from the beginning.
    let complete = folder.path().join("complete.sluice");
    stdout(&sluice(&["convert", source.to_str().unwrap(), complete.to_str().unwrap()]));
    assert_eq!(run(&model, &["--prompt", "ROMEO:"]), run(complete.to_str().unwrap(), &["--prompt", "ROMEO:"]));

    // A folder brings all files of a tokenizer.
    let set = json(&sluice(&["set", &model, "--tokenizer", source.to_str().unwrap(), "--json"]));
    assert_eq!(set["replaced"], json!(["tokenizer.json", "tokenizer_config.json"]));
}

#[test]
fn a_template_for_good_or_for_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of_demo(folder.path());
    let chat = ["--chat", "--prompt", "Hello"];
    assert_fails(
        &sluice(&[&["run", &model], &chat[..]].concat()),
        2,
        &["no chat template", "--chat-template", "sluice set"],
    );
    let template = write(folder.path(), "t.jinja", TEMPLATE);
    let once = run(&model, &["--chat-template", &template, "--prompt", "Hello", "--system", "Be brief."]);
    assert_eq!(once, run(&model, &["--prompt", "system: Be brief.\nuser: Hello\n"]));
    assert!(sluice(&[&["run", &model], &chat[..]].concat()).status.code() == Some(2), "it was for one run");

    let before = json(&sluice(&["inspect", &model, "--json"]));
    stdout(&sluice(&["run", &model, "--prompt", "Hello", "-n", "2"]));
    let counts = fs::read(format!("{model}.counts")).unwrap();
    let set = json(&sluice(&["set", &model, "--chat-template", &template, "--json"]));
    assert_eq!(set["replaced"], json!(["chat_template.jinja"]));
    assert_eq!(set["state_id"], before["state_id"]);
    assert_ne!(set["model_id"], before["model_id"]);
    assert_eq!(run(&model, &chat), run(&model, &["--prompt", "user: Hello\n"]));
    assert_eq!(fs::read(format!("{model}.counts")).unwrap(), counts);

    // One within JSON, as tokenizer_config.json has it, goes before what is set.
    let config = write(folder.path(), "c.json", &json!({"chat_template": "{{ messages[0].content }}!"}).to_string());
    assert_eq!(run(&model, &[&chat[..], &["--chat-template", &config]].concat()), run(&model, &["--prompt", "Hello!"]));
    assert_fails(&sluice(&["run", &model, "--prompt", "a", "--system", "b"]), 2, &["--chat"]);
}

/// Whoever has set a template for a model of 600 GB is not told to convert it again.
#[test]
fn what_is_set_differs_from_the_source_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let (model, source) = (copy_of_demo(folder.path()), demo_checkpoint());
    let template = write(folder.path(), "t.jinja", TEMPLATE);
    stdout(&sluice(&["set", &model, "--chat-template", &template]));
    let verify = sluice(&["verify", &model, "--source", source.to_str().unwrap()]);
    assert_fails(&verify, 1, &["only files differ that `sluice set` replaces", "no need to convert"]);
    // And the other way round.
    let other = checkpoint(folder.path(), &[("chat_template.jinja", Some(TEMPLATE))]);
    let verify = sluice(&["verify", demo_model(), "--source", other.to_str().unwrap()]);
    assert_fails(&verify, 1, &["no need to convert"]);
    let said = String::from_utf8(verify.stdout).unwrap();
    assert!(said.contains("chat_template.jinja: the model file does not hold it"), "{said}");
}

#[test]
fn what_does_not_work_is_not_set() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of_demo(folder.path());
    let before = fs::read(&model).unwrap();
    let file = |name, content| write(folder.path(), name, content);
    let (broken, refuses) = (file("broken", "{% for"), file("refuses", "{{ raise_exception('never') }}"));
    let (no_json, no_end) = (file("no-json", "{"), file("no-end", r#"{"eos_token_id": "two"}"#));
    let (empty, config) = (folder.path().to_str().unwrap(), file("config", r#"{"model_type": "x"}"#));
    let (deaf, model_config) = (file("deaf", "constant"), file("m.json", r#"{"model_type": "x", "eos_token_id": 1}"#));
    let cases: [(&[&str], i32, &[&str]); 12] = [
        (&[], 2, &["--tokenizer", "--chat-template"]),
        (&["--chat-template", &deaf], 1, &["as it was", &deaf, "the user's message"]),
        (&["--generation-config", &model_config], 1, &["m.json", "describes a model"]),
        (&["--chat-template", &broken], 1, &["copy.sluice is as it was", &broken, "line 1"]),
        (&["--chat-template", &refuses], 1, &["as it was", "never"]),
        (&["--chat-template", &config], 1, &["config", "chat_template"]),
        (&["--generation-config", &no_json], 1, &["as it was", "generation_config.json"]),
        (&["--generation-config", &no_end], 1, &["as it was", "eos_token_id"]),
        (&["--tokenizer", &no_json], 1, &["as it was", &no_json, "tokenizer.json"]),
        (&["--tokenizer", empty], 1, &["no tokenizer.json"]),
        (&["--tokenizer", "/dev/zero"], 1, &["/dev/zero", "128.0 MiB"]),
        (&["--tokenizer", "/no/such/file"], 1, &["/no/such/file"]),
    ];
    for (args, code, words) in cases {
        assert_fails(&sluice(&[&["set", &model], args].concat()), code, words);
        assert!(fs::read(&model).unwrap() == before, "{args:?}");
    }
    assert_fails(&sluice(&["set", &broken, "--tokenizer", empty]), 1, &["not a Sluice model file"]);
}

#[test]
fn an_interrupted_change_is_finished_or_undone() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of_demo(folder.path());
    let before = fs::read(&model).unwrap();
    // As if the log had been cut off.
    fs::write(&model, [&before[..], &[0; 8192]].concat()).unwrap();
    assert_fails(&sluice(&["run", &model, "--prompt", "a"]), 1, &["sluice set"]);
    let undone = sluice(&["set", &model]);
    assert!(undone.status.success() && stderr(&undone).contains("undone"), "{}", stderr(&undone));
    assert!(fs::read(&model).unwrap() == before);
}

#[test]
fn sampling_defaults_that_make_no_sense_stop_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of_demo(folder.path());
    let set = |content: &str| {
        let file = write(folder.path(), "generation_config.json", content);
        stdout(&sluice(&["set", &model, "--generation-config", &file]));
    };
    let run = |args: &[&str]| sluice(&[&["run", &model, "--prompt", "ROMEO:", "-n", "2", "--forget"], args].concat());
    for (content, noted) in [
        (r#"{"do_sample": false, "top_p": 0.0, "max_length": Infinity}"#, None),
        (r#"{"do_sample": true, "top_k": 20.0}"#, None),
        (r#"{"do_sample": true, "top_p": 1.2}"#, Some("top_p 1.2")),
        (r#"{"repetition_penalty": 0.0}"#, Some("repetition_penalty 0.0")),
    ] {
        set(content);
        let output = run(&[]);
        stdout(&output);
        match noted {
            None => assert_eq!(stderr(&output), "", "{content}"),
            Some(word) => {
                assert!(stderr(&output).contains(word) && stderr(&output).contains("--"), "{}", stderr(&output))
            }
        }
    }
    set(r#"{"do_sample": true, "temperature": 0.7, "top_p": 1.2}"#);
    assert_eq!(stderr(&run(&["--top-p", "0.9"])), "");
    let report = json(&run(&["--json"]));
    assert_eq!(report["temperature"].to_string(), "0.7");
}
