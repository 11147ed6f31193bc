//! What was measured, as a table and as JSON.

use serde::Serialize;

use super::machine::Machine;

/// All repetitions of one number.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// What was measured.
    pub name: String,
    /// Unit of the values.
    pub unit: &'static str,
    /// One for each repetition, in order.
    pub values: Vec<f64>,
}

/// A comparison, beside what the issue expects of it.
#[derive(Clone, Debug, Serialize)]
pub struct Expectation {
    /// What is compared.
    pub what: String,
    /// The bound; none if it is only to be known.
    pub bound: Option<f64>,
    /// The value has to be at most the bound (otherwise at least).
    pub at_most: bool,
    /// One for each repetition.
    pub values: Vec<f64>,
    /// Whether the median keeps the bound, if there is one.
    pub met: bool,
}

/// A run of the benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub machine: Machine,
    /// The numbers.
    pub series: Vec<Series>,
    /// What they were expected to be.
    pub expectations: Vec<Expectation>,
}

/// Minimum, median and maximum.
#[must_use]
pub fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.as_slice() {
        [] => (f64::NAN, f64::NAN, f64::NAN),
        all => (all[0], all[all.len() / 2], all[all.len() - 1]),
    }
}

impl Report {
    /// An empty one.
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        Self { machine, series: Vec::new(), expectations: Vec::new() }
    }

    /// Adds one repetition's value.
    pub fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        match self.series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.values.push(value),
            None => self.series.push(Series { name: name.to_owned(), unit, values: vec![value] }),
        }
    }

    /// The values of a number; empty if it was not measured.
    #[must_use]
    pub fn values(&self, name: &str) -> &[f64] {
        self.series.iter().find(|series| series.name == name).map_or(&[], |series| &series.values)
    }

    /// Compares two numbers, repetition by repetition, with a bound. Nothing if one was not measured.
    pub fn expect_ratio(&mut self, what: &str, of: &str, to: &str, bound: Option<f64>, at_most: bool) {
        let ratios = self.values(of).iter().zip(self.values(to)).map(|(of, to)| of / to).collect();
        self.expect(what, ratios, bound, at_most);
    }

    /// Compares values with a bound.
    pub fn expect(&mut self, what: &str, values: Vec<f64>, bound: Option<f64>, at_most: bool) {
        if values.is_empty() {
            return;
        }
        let (_, median, _) = spread(&values);
        let met = bound.is_none_or(|bound| if at_most { median <= bound } else { median >= bound });
        self.expectations.push(Expectation { what: what.to_owned(), bound, at_most, values, met });
    }

    /// The tables for the terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let Machine { processor, cpus, kernel } = &self.machine;
        let mut text = format!("{processor}, {cpus} CPUs, Linux {kernel}\n\n");
        text += &format!("{:<60} {:>10} {:>10} {:>10}  {:<8} n\n", "", "min", "median", "max", "unit");
        for Series { name, unit, values } in &self.series {
            let (min, median, max) = spread(values);
            // CPU seconds for a gigabyte are small numbers.
            let digits = if max.abs() < 10.0 { 3 } else { 1 };
            let [min, median, max] = [min, median, max].map(|value| format!("{value:>10.digits$}"));
            text += &format!("{name:<60} {min} {median} {max}  {unit:<8} {}\n", values.len());
        }
        text += &format!("\n{:<64} {:>8} {:>8} {:>8} {:>8}\n", "expected", "bound", "min", "median", "max");
        for Expectation { what, bound, at_most, values, met } in &self.expectations {
            let (min, median, max) = spread(values);
            let sign = if *at_most { "≤" } else { "≥" };
            let (bound, verdict) = match (bound, met) {
                (None, _) => (String::new(), ""),
                (Some(bound), true) => (format!("{sign} {bound}"), "met"),
                (Some(bound), false) => (format!("{sign} {bound}"), "NOT MET"),
            };
            text += &format!("{what:<64} {bound:>8} {min:>8.2} {median:>8.2} {max:>8.2}  {verdict}\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_paired_and_the_median_decides() {
        let machine = Machine { processor: "p".into(), cpus: 1, kernel: "k".into() };
        let mut report = Report::new(machine);
        for (ours, theirs) in [(12.0, 10.0), (24.0, 10.0), (11.0, 10.0)] {
            report.add("ours", "ns", ours);
            report.add("theirs", "ns", theirs);
        }
        report.expect_ratio("close", "ours", "theirs", Some(1.2), true);
        report.expect_ratio("far", "ours", "theirs", Some(1.3), false);
        report.expect_ratio("never measured", "ours", "nobody", Some(1.0), true);
        assert_eq!(report.expectations.len(), 2);
        assert_eq!(report.expectations[0].values, [1.2, 2.4, 1.1]);
        assert!(report.expectations[0].met);
        assert!(!report.expectations[1].met);
    }
}
