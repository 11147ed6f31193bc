//! Views as text: tables for people, JSON and YAML for programs.
//!
//! Pure: a view in, a string out. Columns keep their order and names; new ones go to the right.

mod doctor;
mod drops;
mod flows;
mod status;
mod table;
pub mod units;

use serde::Serialize;

/// How to write a view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A table.
    #[default]
    Table,
    /// A table with more columns.
    Wide,
    /// JSON, indented.
    Json,
    /// YAML.
    Yaml,
}

/// A view that can be written as a table.
pub trait Render: Serialize {
    /// The view as a table that ends in a newline; an empty view is a sentence.
    fn table(&self, wide: bool) -> String;
}

/// Writes a view.
///
/// # Errors
/// When a value cannot be serialized, which for plain data does not happen.
pub fn render(view: &impl Render, format: Format) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table => view.table(false),
        Format::Wide => view.table(true),
        Format::Json => serde_json::to_string_pretty(view)? + "\n",
        Format::Yaml => serde_saphyr::to_string(view)?,
    })
}
