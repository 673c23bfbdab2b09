// Package statemachine has a reference model of what a device does (State), and a
// simulated device that is compared with it at every step (Machine). Tests drive
// the machine with random sequences of operations, power cuts and other faults;
// tests of concurrency and endurance use the same two.
//
// The model is written from the documentation of package ota. It knows nothing
// of records, digests and flash operations: an operation is a short list of
// states, each of which is stored as a whole or not at all.
//
// What was promised (a trial that is over does not run, no more boots than tries,
// the floor does not fall, only what was committed runs as committed, nothing
// selected is written) takes Machine some sixty lines, apart from the model:
// handedOver, done, watchWrites. The model is larger than that because it says
// more: every state that an operation passes through, so that a cut anywhere can
// be judged; every refusal, each with its error and in the order in which several
// apply, as callers get to see them; which slot is written, and what is found in
// place; the outcome and its reason. The tests of linearizability need as much:
// an answer that may be one of several fits nearly any order of the calls.
package statemachine

import (
	"time"

	"github.com/slotota/ota"
)

// MaxSlots is the number of slots that a State has room for.
const MaxSlots = 3

// Firmware is what a State says about the content of a slot.
type Firmware struct {
	Version            int // which image; 0 if unknown
	Security           uint64
	Approved, Rejected bool
}

// Factory is the firmware that a device comes with, once it was measured.
var Factory = Firmware{Version: 1, Approved: true}

// State is the state of a device. States can be compared by ==.
type State struct {
	Running, Active, Revert ota.SlotID
	Committed, Booted       bool
	Tries                   int
	Timeout                 time.Duration
	Floor                   uint64
	Trial                   int // number of the newest trial, 0 if there was none
	Outcome                 ota.Outcome
	Reason                  ota.Reason
	Last                    ota.SlotID // slot that the outcome is about
	Slots                   [MaxSlots]Firmware
}

// Initial is the state of a device that nothing was ever stored on.
func Initial() State { return State{Committed: true, Revert: ota.NoSlot} }

// Env is what the outcome of an operation depends on beside the state.
type Env struct {
	Slots int                               // of the device
	Tries int                               // of a trial
	Next  int                               // number of the next trial
	Up    time.Duration                     // time since the boot
	Holds func(slot ota.SlotID, v int) bool // whether a slot holds image v to the last byte
}

// Step is what an operation does to a state.
type Step struct {
	Err   error   // what it is refused with, or nil
	Steps []State // what it stores, in order
}

// End returns the state after the step, taken in s.
func (st Step) End(s State) State {
	if len(st.Steps) == 0 {
		return s
	}
	return st.Steps[len(st.Steps)-1]
}

func refuse(err error) Step { return Step{Err: err} }

// idle returns why no slot may be touched.
func (s State) idle() error {
	switch {
	case !s.Committed:
		return ota.ErrNotCommitted
	case s.Active != s.Running:
		return ota.ErrRebootPending
	}
	return nil
}

// measured returns s knowing what runs.
func (s State) measured() State {
	if s.Slots[s.Running].Version == 0 {
		s.Slots[s.Running] = Factory
	}
	return s
}

func (s State) trial(e Env, active, revert ota.SlotID, timeout time.Duration) State {
	s.Active, s.Revert, s.Committed = active, revert, false
	s.Timeout, s.Tries, s.Booted, s.Trial = timeout, e.Tries, false, e.Next
	s.Outcome, s.Reason, s.Last = 0, 0, 0
	s.Slots[active].Rejected = false
	return s
}

func (s State) over(o ota.Outcome, why ota.Reason) State {
	s.Outcome, s.Reason, s.Last = o, why, s.Active
	s.Committed, s.Revert, s.Timeout, s.Tries, s.Booted = true, ota.NoSlot, 0, 0, false
	return s
}

func (s State) reverted(why ota.Reason, reject bool) State {
	to := s.Revert
	if reject {
		s.Slots[s.Active].Rejected = true
	}
	s = s.over(ota.OutcomeReverted, why)
	s.Active = to
	return s
}

func (s State) committed() State {
	f := &s.Slots[s.Active]
	f.Approved, f.Rejected = true, false
	s.Floor = max(s.Floor, f.Security)
	return s.over(ota.OutcomeCommitted, 0)
}

// same reports whether two slots hold the same parts.
func same(a, b Firmware) bool {
	return a.Version == b.Version && (a.Version != 1 || (a.Security == 0) == (b.Security == 0))
}

// target returns the slot that f is written to, -1 if there is none.
func (s State) target(e Env, f Firmware) ota.SlotID {
	rank := func(id ota.SlotID) int {
		switch t := s.Slots[id]; {
		case same(t, f):
			return 3
		case t.Version == 0 || t.Rejected:
			return 2
		case id != s.Revert:
			return 1
		}
		return 0
	}
	best := ota.NoSlot
	for id := range ota.SlotID(e.Slots) {
		if id != s.Running && id != s.Active && (best < 0 || rank(id) > rank(best)) {
			best = id
		}
	}
	return best
}

// fill returns s without, then with f in slot id. bad is what is wrong with the
// data of f, if it is needed.
func (s State) fill(e Env, id ota.SlotID, f Firmware, bad error) (Step, State) {
	fresh := s.Slots[s.Running].Version == 0 // nothing is stored: any slot may be started
	s = s.measured()
	var st Step
	if t := s.Slots[id]; !same(t, f) || !e.Holds(id, f.Version) {
		known := t.Version != 0 || s.Revert == id || fresh
		s.Slots[id] = Firmware{}
		if s.Revert == id {
			s.Revert = ota.NoSlot
		}
		if known {
			st.Steps = append(st.Steps, s)
		}
		st.Err = bad
	}
	s.Slots[id] = f
	return st, s
}

// Bad is what is wrong with an image.
type Bad struct {
	Early error // found before anything is erased
	Late  error // found in the data
}

// Update is Device.Update of an image.
func (s State) Update(e Env, f Firmware, bad Bad, timeout time.Duration, ignoreSame bool) Step {
	if err := s.idle(); err != nil {
		return refuse(err)
	}
	switch {
	case bad.Early != nil && bad.Early != ota.ErrTooLarge:
		return refuse(bad.Early)
	case f.Security < s.Floor:
		return refuse(ota.ErrRollback)
	case ignoreSame && same(s.Slots[s.Running], f):
		return Step{}
	case bad.Early != nil:
		return refuse(bad.Early)
	}
	if bad.Late == ota.ErrDigest {
		f.Version = -1 // is nowhere in place
	}
	id := s.target(e, f)
	st, s := s.fill(e, id, f, bad.Late)
	if st.Err == nil {
		st.Steps = append(st.Steps, s.trial(e, id, s.Running, timeout))
	}
	return st
}

// Snapshot is Device.CreateSnapshot.
func (s State) Snapshot(e Env, setAsRevert bool, timeout time.Duration) Step {
	if err := s.idle(); err != nil {
		return refuse(err)
	}
	f := s.measured().Slots[s.Running]
	var bad error
	if !e.Holds(s.Running, f.Version) {
		bad = ota.ErrDigest
	}
	id := s.target(e, f)
	st, s := s.fill(e, id, f, bad)
	if st.Err != nil {
		return st
	}
	if setAsRevert {
		s = s.trial(e, s.Running, id, timeout)
	}
	st.Steps = append(st.Steps, s)
	return st
}

// Unknown stands for a trial id that was never issued.
const Unknown = -1

// Commit is Device.Commit with id 0, and else Device.CommitTrial.
func (s State) Commit(e Env, id int) Step {
	switch {
	case s.Committed && id != 0 && id == s.Trial && s.Outcome == ota.OutcomeCommitted:
		return Step{}
	case s.Committed && id != 0 && id == s.Trial && s.Outcome == ota.OutcomeReverted:
		return refuse(ota.ErrReverted)
	case s.Committed && s.Active != s.Running:
		return refuse(ota.ErrReverted)
	case s.Committed:
		return refuse(ota.ErrCommitted)
	case s.Active != s.Running:
		return refuse(ota.ErrRebootPending)
	case id != 0 && id != s.Trial:
		return refuse(ota.ErrWrongTrial)
	case s.Booted && s.Timeout > 0 && e.Up >= s.Timeout:
		return refuse(ota.ErrExpired)
	}
	return Step{Steps: []State{s.committed()}}
}

// RevertNow is Device.Revert, or what Watch does at the deadline.
func (s State) RevertNow(why ota.Reason) Step {
	switch {
	case s.Committed && s.Active != s.Running:
		return refuse(ota.ErrReverted)
	case s.Committed:
		return refuse(ota.ErrCommitted)
	}
	if !s.Booted && s.Active == s.Running {
		// The running firmware was put on trial: it stays.
		return Step{Steps: []State{s.over(ota.OutcomeReverted, why)}}
	}
	return Step{Steps: []State{s.reverted(why, s.Active == s.Running)}}
}

// OnTrial reports whether the running firmware is on trial.
func (s State) OnTrial() bool { return !s.Committed && s.Booted && s.Active == s.Running }

// Expired reports whether Watch returns at once.
func (s State) Expired(e Env) bool {
	return !s.OnTrial() || s.Timeout == 0 || e.Up >= s.Timeout
}

// Watch is Device.Watch once Expired.
func (s State) Watch(e Env) Step {
	switch {
	case !s.OnTrial():
		return Step{}
	case s.Timeout == 0:
		return s.Commit(e, s.Trial)
	}
	st := s.RevertNow(ota.ReasonTimeout)
	st.Err = ota.ErrReverted
	return st
}

// SetBootState is Device.SetBootState.
func (s State) SetBootState(e Env, p ota.BootStatePatch) Step {
	want := s
	set(&want.Active, p.Active)
	set(&want.Revert, p.Revert)
	set(&want.Committed, p.Committed)
	set(&want.Timeout, p.CommitTimeout)
	slot := func(id ota.SlotID) bool { return id >= 0 && int(id) < e.Slots }
	bootable := func(id ota.SlotID) error {
		switch f := s.Slots[id]; {
		case f.Security < s.Floor:
			return ota.ErrRollback
		case f.Version == 0:
			return ota.ErrUnverifiedSlot
		case !e.Holds(id, f.Version):
			return ota.ErrDigest
		}
		return nil
	}
	switch {
	case want.Timeout < 0 || want.Timeout > ota.MaxCommitTimeout:
		return refuse(ota.ErrInvalid)
	case !slot(want.Active), want.Revert != ota.NoSlot && !slot(want.Revert):
		return refuse(ota.ErrUnknownSlot)
	case want == s:
		return Step{}
	case s.idle() != nil:
		return refuse(s.idle())
	}
	next := s.measured()
	switch {
	case want.Active != s.Active:
		if p.Committed != nil && *p.Committed || p.Revert != nil && *p.Revert != s.Running {
			return refuse(ota.ErrInvalid)
		}
		if err := bootable(want.Active); err != nil {
			return refuse(err)
		}
		next = next.trial(e, want.Active, s.Running, want.Timeout)
	case want.Revert == want.Active:
		return refuse(ota.ErrInvalid)
	case !want.Committed && want.Revert == ota.NoSlot:
		return refuse(ota.ErrNoRevert)
	case want.Committed && want.Timeout != s.Timeout:
		return refuse(ota.ErrCommitted)
	default:
		if want.Revert != ota.NoSlot {
			// What a trial goes back to counts as committed at once.
			if f := s.Slots[want.Revert]; f.Version != 0 && (!f.Approved || f.Rejected) {
				return refuse(ota.ErrUnverifiedSlot)
			}
			if err := bootable(want.Revert); err != nil {
				return refuse(err)
			}
		}
		next.Revert = want.Revert
		if !want.Committed {
			next = next.trial(e, s.Running, want.Revert, want.Timeout)
		}
	}
	return Step{Steps: []State{next}}
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// Boot is ota.Boot and ota.Open. Err is ota.ErrNotBootable if nothing can be
// started; else the last state is the one that runs.
func (s State) Boot(e Env) Step {
	var st Step
	good := func(id ota.SlotID) bool {
		v := s.Slots[id].Version
		return v == 0 && s.Committed || v != 0 && e.Holds(id, v)
	}
	if !s.Committed {
		if s.Tries > 0 && good(s.Active) {
			s.Tries--
			s.Booted, s.Running = true, s.Active
			return Step{Steps: []State{s}}
		}
		why := ota.ReasonReset
		if s.Tries > 0 {
			why = ota.ReasonVerify
		}
		s = s.reverted(why, true)
		st.Steps = append(st.Steps, s)
	}
	if !good(s.Active) {
		var id ota.SlotID
		for ; int(id) < e.Slots; id++ {
			f := s.Slots[id]
			if id != s.Active && f.Approved && !f.Rejected && f.Security >= s.Floor && e.Holds(id, f.Version) {
				break
			}
		}
		if int(id) == e.Slots {
			st.Err = ota.ErrNotBootable
			return st
		}
		s.Revert = id
		s = s.reverted(ota.ReasonVerify, true)
	}
	s.Running = s.Active
	st.Steps = append(st.Steps, s)
	return st
}
