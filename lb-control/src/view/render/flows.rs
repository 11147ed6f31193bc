//! `pointsman flows`.

use super::Render;
use super::table::Table;
use super::units::{grouped, plural, seconds};
use crate::view::FlowsView;

impl Render for FlowsView {
    fn table(&self, wide: bool) -> String {
        if self.total == 0 {
            return "There are no flows.\n".to_owned();
        }
        if self.matching == 0 {
            return format!("None of {} matches.\n", plural(self.total, "flow"));
        }
        let mut header = vec!["PROTO", "CLIENT", "VIP", "SNAT", "BACKEND", "STATE", "IDLE"];
        if wide {
            header.push("SERVICE");
        }
        let mut table = Table::new(&header);
        for flow in &self.flows {
            let mut row = vec![
                flow.protocol.clone(),
                flow.client.to_string(),
                flow.vip.to_string(),
                flow.snat.to_string(),
                flow.backend.to_string(),
                flow.state.clone(),
                seconds(flow.idle_seconds),
            ];
            if wide {
                row.push(flow.service.clone());
            }
            table.row(&row);
        }
        format!("{}\n{}\n", table.finish(), summary(self))
    }
}

/// `2 of 4 flows match, 1 shown: 2 established, 1 time-wait.`
fn summary(view: &FlowsView) -> String {
    let shown = view.flows.len() as u64;
    let mut by_state: Vec<_> = view.by_state.iter().collect();
    by_state.sort_by_key(|&(name, number)| (std::cmp::Reverse(*number), name));
    let states: Vec<String> =
        by_state.iter().map(|(name, number)| format!("{} {name}", grouped(**number))).collect();
    let mut text = match view.matching == view.total {
        true => plural(view.total, "flow"),
        false => format!("{} of {}", grouped(view.matching), plural(view.total, "flow")),
    };
    if shown < view.matching {
        text += &format!(" ({} shown, --limit 0 shows all)", grouped(shown));
    }
    format!("{text}: {}.", states.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::FlowFilter;
    use crate::view::flows::tests::flow;

    #[test]
    fn table_and_summary() {
        let flows = [
            flow("198.51.100.1:1000", "10.0.0.2:8080", "default/web", "established"),
            flow("198.51.100.1:1001", "10.0.0.3:8080", "default/web", "established"),
            flow("198.51.100.1:1002", "10.0.0.3:8080", "default/web", "time-wait"),
            flow("198.51.100.9:1", "10.0.0.3:8080", "default/api", "time-wait"),
        ];
        let filter =
            FlowFilter { limit: Some(1), service: Some("default/web".into()), ..FlowFilter::default() };
        let view = filter.apply(flows).unwrap();
        assert_eq!(
            view.table(false),
            "PROTO   CLIENT              VIP             SNAT             BACKEND         STATE         IDLE\n\
             TCP     198.51.100.1:1000   192.0.2.10:80   10.0.0.1:40000   10.0.0.2:8080   established   3s\n\
             \n\
             3 of 4 flows (1 shown, --limit 0 shows all): 2 established, 1 time-wait.\n"
        );
        assert!(view.table(true).lines().nth(1).unwrap().ends_with("default/web"));
    }

    #[test]
    fn nothing_is_a_sentence() {
        assert_eq!(FlowsView::default().table(false), "There are no flows.\n");
        let view = FlowsView { total: 1, ..FlowsView::default() };
        assert_eq!(view.table(false), "None of 1 flow matches.\n");
    }
}
