package statemachine

import (
	"time"

	"github.com/slotota/ota"
)

// Next returns what op stores in state s, one state after the other. A power cut
// leaves the device in s or in any of them; otherwise it ends in the last one.
// That op is not refused is taken for granted, see Do.
func (s State) Next(e Env, op Op) []State {
	switch op.Kind {
	case Update:
		steps, t, id := s.write(e, op.Content)
		return append(steps, t.trial(e, id, s.Running, op.Timeout))
	case Snapshot:
		steps, t, id := s.write(e, Content{Firmware: s.measured().Slots[s.Running]})
		if op.SetAsRevert {
			t = t.trial(e, s.Running, id, op.Timeout)
		}
		return append(steps, t)
	case Commit:
		f := &s.Slots[s.Active]
		f.Approved, f.Rejected = true, false
		s.Floor = max(s.Floor, f.Security)
		return []State{s.over(ota.OutcomeCommitted, 0, s.Active)}
	case Revert:
		switch {
		case s.Active != s.Running: // called off before it ran
			return []State{s.over(ota.OutcomeReverted, op.Reason, s.Revert)}
		case !s.Booted: // what runs was to be tried again, and stays
			return []State{s.over(ota.OutcomeReverted, op.Reason, s.Running)}
		}
		return []State{s.failed(op.Reason, s.Revert)}
	case SetBootState:
		want, t := s.patched(op.Patch), s.measured()
		switch {
		case want.Active != s.Active:
			t = t.trial(e, want.Active, s.Running, want.Timeout)
		case !want.Committed:
			t = t.trial(e, s.Running, want.Revert, want.Timeout)
		default:
			t.Revert = want.Revert
		}
		return []State{t}
	}
	return nil
}

// Boot returns what ota.Boot and ota.Open store, the last being the state that
// runs; ok is false if nothing can be booted. A trial runs while it has tries
// left, else the revert slot. What is damaged does not run, but firmware that was
// never measured does.
func (s State) Boot(e Env) (steps []State, ok bool) {
	switch {
	case !s.Committed && s.Tries > 0 && s.holds(e, s.Active):
		s.Tries, s.Booted, s.Running = s.Tries-1, true, s.Active
		return []State{s}, true
	case !s.Committed && s.Tries > 0:
		s = s.failed(ota.ReasonVerify, s.Revert)
		steps = append(steps, s)
	case !s.Committed:
		s = s.failed(ota.ReasonReset, s.Revert)
		steps = append(steps, s)
	}
	if s.Slots[s.Active].Version != 0 && !s.holds(e, s.Active) {
		other := s.fallback(e)
		if other == ota.NoSlot {
			return steps, false
		}
		s = s.failed(ota.ReasonVerify, other)
	}
	s.Running = s.Active
	return append(steps, s), true
}

// write returns s with c in a slot, which is forgotten first unless c is in place.
func (s State) write(e Env, c Content) (steps []State, _ State, id ota.SlotID) {
	id = s.target(e, c)
	s = s.measured()
	if !c.is(s.Slots[id]) || !e.Holds(id, c.Version) {
		s.Slots[id] = Firmware{}
		if s.Revert == id {
			s.Revert = ota.NoSlot
		}
		steps = []State{s}
	}
	s.Slots[id] = c.Firmware
	return steps, s, id
}

// trial returns s with active on trial.
func (s State) trial(e Env, active, revert ota.SlotID, timeout time.Duration) State {
	s.Active, s.Revert, s.Committed, s.Booted = active, revert, false, false
	s.Timeout, s.Tries, s.Trial = timeout, e.Tries, e.Next
	s.Outcome, s.Reason, s.Last = 0, 0, 0
	s.Slots[active].Rejected = false
	return s
}

// over returns s with its trial over and active committed.
func (s State) over(o ota.Outcome, why ota.Reason, active ota.SlotID) State {
	s.Outcome, s.Reason, s.Last = o, why, s.Active
	s.Active, s.Committed, s.Revert = active, true, ota.NoSlot
	s.Timeout, s.Tries, s.Booted = 0, 0, false
	return s
}

// failed returns s gone back from firmware that is not to run again.
func (s State) failed(why ota.Reason, to ota.SlotID) State {
	s.Slots[s.Active].Rejected = true
	return s.over(ota.OutcomeReverted, why, to)
}

// measured returns s knowing what runs.
func (s State) measured() State {
	if s.Slots[s.Running].Version == 0 {
		s.Slots[s.Running] = Factory
	}
	return s
}
