//! Reports of a running model: they agree with the engine, they come when somebody looks, and they do not delay a step.

use sluice_format::WeightType;
use sluice_generate::{Model, Request, SchedulerOptions, Work};
use sluice_model::EngineOptions;
use sluice_tests::Converted;
use sluice_tests::house::House;

fn options() -> EngineOptions {
    EngineOptions { context: Some(128), forget: true, threads: Some(1), ..EngineOptions::default() }
}

#[test]
fn a_report_says_what_the_engine_says() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    // Fewer slots than experts, so only some experts are in memory.
    let engine =
        model.open(&EngineOptions { budget: Some(model.least_budget_for(&options()) + (1 << 20)), ..options() });
    let mut house = House::new(engine, SchedulerOptions::default());
    let submitter = house.scheduler.submitter();
    assert!(submitter.report().is_none());
    assert_eq!(house.scheduler.wait_for(None), Work::Ready, "somebody wants a report");
    house.run();
    let first = submitter.report().expect("it was asked for");
    assert_eq!((first.total.tokens, first.window.is_none(), first.at_rest), (0, true, false));
    assert!(first.experts.iter().all(|layer| layer.count() == 0), "nothing was read yet");

    house.submit(Request::new(vec![5, 6, 7], 20));
    house.run();
    let report = submitter.report().expect("there was one before");
    assert_eq!(report.total, house.engine.stats());
    let window = report.window.as_ref().expect("somebody has watched");
    assert_eq!(window.stats.tokens, 22, "three of the prompt and 19 of the answer went through the layers");
    let rate = window.hit_rate.expect("experts were needed");
    assert!(rate > 0.0 && rate < 1.0 && window.drive_bytes_per_second > 0.0);
    assert_eq!(report.memory, *house.engine.memory());
    assert_eq!(report.pages.len(), house.engine.pages().len());
    assert_eq!((report.name.as_str(), report.family.as_str()), ("model", house.engine.spec().family.as_str()));
    let resident: usize = report.experts.iter().map(|layer| layer.count()).sum();
    assert!(resident > 0 && resident <= report.memory.slots);
    let all: usize = report.experts.iter().map(|layer| layer.experts).sum();
    assert_eq!(all, report.memory.experts);

    // Time between two pieces of work does not belong to a window.
    house.submit(Request::new(vec![8, 9], 5));
    house.run();
    let next = submitter.report().expect("there was one before");
    assert_eq!(next.window.as_ref().map(|window| window.stats.tokens), Some(6));

    let json = serde_json::to_value(&*report).expect("numbers and text");
    let digits = json["experts"][0]["resident"].as_str().expect("hexadecimal digits");
    let ones: u32 = digits.chars().map(|digit| digit.to_digit(16).expect("a digit").count_ones()).sum();
    assert_eq!(ones as usize, report.experts[0].count());
}

#[test]
fn work_that_nobody_watched_is_in_the_next_report() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut house = House::new(model.open(&options()), SchedulerOptions::default());
    house.submit(Request::new(vec![1], 3));
    house.run();
    let submitter = house.scheduler.submitter();
    assert!(submitter.report().is_none(), "nobody has asked before");
    assert_eq!(house.scheduler.wait_for(None), Work::Ready);
    house.run();
    assert_eq!(submitter.report().expect("it was asked for").total, house.engine.stats());
}

#[test]
fn a_model_at_rest_shows_that_it_is() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let rest_after = Some(std::time::Duration::from_millis(1));
    let options = SchedulerOptions { rest_after, ..SchedulerOptions::default() };
    let model = Model::new(converted.open(&self::options()), options, false).unwrap();
    model.complete(Request::new(vec![1, 2], 2)).unwrap();
    // It becomes idle at some time; looking does not prevent that.
    let at_rest = loop {
        match model.report().filter(|report| report.at_rest) {
            Some(report) => break report,
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    };
    assert_eq!(at_rest.total.tokens, 3);
    assert!(at_rest.experts.iter().all(|layer| layer.count() == 0));
}
