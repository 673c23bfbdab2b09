// Package statemachine has a reference model of what a device does (State.Next and
// State.Boot), and a simulated device that is compared with it at every step
// (Machine). Tests drive the machine with random sequences of operations, power
// cuts and other faults; tests of concurrency and endurance use the same two.
//
// The model, model.go, is written from the documentation of package ota. It knows
// nothing of records, digests and flash operations: an operation is a short list of
// states, each of which is stored as a whole or not at all. Beside it stand which
// slot is chosen (choice.go) and what is refused (refusals.go). What was promised
// beyond that (a trial that is over does not run, no more boots than tries, the
// floor does not fall, only what was committed runs as committed, nothing selected
// is written) is checked by Machine, apart from the model.
package statemachine

import (
	"fmt"
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

// Content is an image as the model sees it.
type Content struct {
	Firmware
	Refused error // why, by its description
	NoRoom  error // why it fits into no slot
	Corrupt bool  // its digest is nobody's, so that it is nowhere in place
	Broken  error // what is wrong with its data, found when they are needed
}

// Kind is a kind of operation.
type Kind uint8

// The operations that change the state.
const (
	Update       Kind = iota // Device.Update
	Snapshot                 // Device.CreateSnapshot
	Commit                   // Device.Commit, or CommitTrial if Op.Trial is not 0
	Revert                   // Device.Revert, or what Watch does at the deadline
	SetBootState             // Device.SetBootState
)

// Op is an operation.
type Op struct {
	Kind        Kind
	Content     Content // Update
	IgnoreSame  bool    // Update
	SetAsRevert bool    // Snapshot
	Timeout     time.Duration
	Trial       int        // Commit
	Reason      ota.Reason // Revert
	Patch       ota.BootStatePatch
}

// Unknown stands for a trial id that was never issued.
const Unknown = -1

// Step is what an operation does to a state: what it is refused with, or nil, and
// what it stores, one state after the other.
type Step struct {
	Err   error
	Steps []State
}

// End returns the state after the step, taken in s.
func (st Step) End(s State) State {
	if len(st.Steps) == 0 {
		return s
	}
	return st.Steps[len(st.Steps)-1]
}

// OnTrial reports whether the running firmware is on trial.
func (s State) OnTrial() bool { return !s.Committed && s.Booted && s.Active == s.Running }

// Expired reports whether Watch returns at once.
func (s State) Expired(e Env) bool { return !s.OnTrial() || s.Timeout == 0 || e.Up >= s.Timeout }

// Watch is Device.Watch once Expired.
func (s State) Watch(e Env) Step {
	switch {
	case !s.OnTrial():
		return Step{}
	case s.Timeout == 0:
		return s.Do(e, Op{Kind: Commit, Trial: s.Trial})
	}
	return Step{ota.ErrReverted, s.Next(e, Op{Kind: Revert, Reason: ota.ReasonTimeout})}
}

// View returns the boot state of a simulated device as a state of the model,
// without the number of the trial.
func View(s ota.BootState, running ota.SlotID) (State, error) {
	v := State{
		Running: running, Active: s.Active, Revert: s.Revert, Committed: s.Committed, Booted: s.Booted,
		Tries: s.Tries, Timeout: s.CommitTimeout, Floor: s.Floor,
		Outcome: s.Last.Outcome, Reason: s.Last.Reason, Last: s.Last.Slot,
	}
	if s.Last.Outcome != ota.OutcomeNone && s.Last.Trial != s.Trial {
		return v, fmt.Errorf("the outcome of trial %v, the last one was %v", s.Last.Trial, s.Trial)
	}
	for i := range v.Slots {
		var err error
		if v.Slots[i], err = viewSlot(s.Slot(ota.SlotID(i))); err != nil {
			return v, err
		}
	}
	return v, nil
}

// viewSlot returns what a boot state says of a slot of a simulated device.
func viewSlot(s ota.SlotState) (Firmware, error) {
	f := Firmware{Security: s.Security, Approved: s.Approved, Rejected: s.Rejected}
	switch {
	case len(s.Parts) == 0:
		if s.Version != "" || s.BuildID != "" {
			return f, fmt.Errorf("a slot without content has version %q", s.Version)
		}
	case s.Version == "":
		f.Version = 1
	default:
		if _, err := fmt.Sscanf(s.Version, "%d.0", &f.Version); err != nil {
			return f, fmt.Errorf("version %q: %w", s.Version, err)
		}
	}
	return f, nil
}
