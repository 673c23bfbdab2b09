package crashtest

import (
	"testing"
)

// Run explores each scenario in a subtest of its name, which fails with the text
// that replays the failure, and logs the figures. With Options.Replay it makes
// only the run named there, or skips the test if that is not about any of the
// scenarios. Give it the value of a flag:
//
//	var replay = flag.String("crash.replay", "", "repeat the run of this text")
func Run(t *testing.T, scenarios []Scenario, o *Options) Report {
	t.Helper()
	if o != nil && o.Replay != "" {
		replay(t, scenarios, o.Replay)
		return Report{}
	}
	var total Report
	for _, s := range scenarios {
		t.Run(s.Name, func(t *testing.T) {
			r, err := Explore(t.Context(), s, o)
			total.add(r)
			if err != nil {
				t.Fatal(err)
			}
			if r.Total() == 0 {
				t.Fatalf("no fault has struck in %d operations and %d reads", r.Ops, r.Reads)
			}
		})
	}
	t.Logf("%d scenarios, %d runs with faults: %v", len(scenarios), total.Total(), total)
	return total
}

func replay(t *testing.T, scenarios []Scenario, text string) {
	t.Helper()
	name, faults, err := ParseReplay(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range scenarios {
		if s.Name != name {
			continue
		}
		if err := s.Replay(t.Context(), faults...); err != nil {
			t.Fatal(err)
		}
		t.Logf("%q: nothing wrong", text)
		return
	}
	t.Skipf("replaying %q, which is about none of the scenarios here", text)
}
