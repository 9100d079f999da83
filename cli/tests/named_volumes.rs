//! Models in volumes: named by the name that they would have as one file, and what is known of them goes with them.

use std::fs;
use std::path::Path;

use crate::common::{assert_fails, demo_checkpoint, demo_model, json, sluice, stderr, stdout};

/// What `convert` names as the least size of a volume of the demo model.
fn least(dst: &str) -> String {
    let source = demo_checkpoint();
    let output = sluice(&["convert", source.to_str().unwrap(), dst, "--split-size", "1KB"]);
    assert_fails(&output, 1, &["volumes of 1000 bytes are too small", "the least is"]);
    let said = stderr(&output);
    let (_, least) = said.split_once("the least is ").unwrap();
    least.split(' ').next().unwrap().to_owned()
}

/// The demo model in volumes, as `m.sluice` of a folder, which is the name that is returned.
fn in_volumes(folder: &Path) -> String {
    let dst = folder.join("m.sluice").to_str().unwrap().to_owned();
    let (source, least) = (demo_checkpoint(), least(&dst));
    let made = json(&sluice(&["convert", source.to_str().unwrap(), &dst, "--split-size", &least, "--json"]));
    assert!(made["files"].as_array().unwrap().len() > 1 && !fs::exists(&dst).unwrap());
    dst
}

#[test]
fn the_name_without_numbers_is_enough_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let name = in_volumes(folder.path());
    let name = name.as_str();
    let inspected = json(&sluice(&["inspect", name, "--json"]));
    assert!(inspected["volumes"].as_array().unwrap().len() > 1);
    assert_eq!(json(&sluice(&["verify", name, "--json"]))["intact"], true);
    assert_eq!(json(&sluice(&["plan", name, "--json"]))["types_from"], "those of the file");
    let run = ["run", name, "--prompt-ids", "5,6,7", "-n", "3", "--ids"];
    assert_eq!(stdout(&sluice(&run)).trim().split(',').count(), 3);
    let ids = stdout(&sluice(&["tokenize", name, "--text", "a word", "--json"]));
    assert!(ids.contains('['), "{ids}");
    let text = folder.path().join("text");
    fs::write(&text, "The sluice opens, and the water comes.").unwrap();
    let text = text.to_str().unwrap();
    let compared = json(&sluice(&["compare", name, name, "--text", text, "--json"]));
    assert_eq!(compared["divergence"].as_f64(), Some(0.0), "{compared}");
    let template = folder.path().join("t.jinja");
    fs::write(&template, "{{ messages[0]['content'] }}").unwrap();
    stdout(&sluice(&["set", name, "--chat-template", template.to_str().unwrap()]));
    assert_eq!(json(&sluice(&["inspect", name, "--json"]))["has_chat_template"], true);
    // Of a model that is not there, the name that was asked for is said.
    let other = folder.path().join("other.sluice");
    assert_fails(&sluice(&["inspect", other.to_str().unwrap()]), 1, &["other.sluice"]);
}

#[test]
fn what_is_known_of_the_experts_goes_with_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::copy(demo_model(), at("m.sluice")).unwrap();
    stdout(&sluice(&["run", &at("m.sluice"), "--prompt", "a", "-n", "3"]));
    let counts = fs::read(at("m.sluice.counts")).unwrap();
    // To another place.
    fs::create_dir(at("other")).unwrap();
    stdout(&sluice(&["upgrade", &at("m.sluice"), &at("other/n.sluice"), "--compress"]));
    assert_eq!(fs::read(at("other/n.sluice.counts")).unwrap(), counts);
    // Into volumes in its own place, and out of them.
    let least = {
        let said = stderr(&sluice(&["upgrade", &at("m.sluice"), "--split-size", "1KB"]));
        said.split_once("the least is ").unwrap().1.split(' ').next().unwrap().to_owned()
    };
    stdout(&sluice(&["upgrade", &at("m.sluice"), "--split-size", &least]));
    assert!(!fs::exists(at("m.sluice")).unwrap());
    assert_eq!(fs::read(at("m.sluice.counts")).unwrap(), counts);
    stdout(&sluice(&["run", &at("m.sluice"), "--prompt", "a", "-n", "3"]));
    let learned = fs::read(at("m.sluice.counts")).unwrap();
    assert_ne!(learned, counts, "a run has learned more");
    stdout(&sluice(&["upgrade", &at("m.sluice"), &at("whole.sluice")]));
    assert_eq!(fs::read(at("whole.sluice.counts")).unwrap(), learned);
    let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.ends_with(".counts")).count(), 2);
}
