package statemachine

import (
	"cmp"
	"errors"

	"github.com/slotota/ota"
)

// Do is Next, told what is refused and what changes nothing.
func (s State) Do(e Env, op Op) Step {
	err := s.refusal(e, op)
	if err != nil || s.moot(op) {
		return Step{Err: err}
	}
	steps := s.Next(e, op)
	if op.Kind == Snapshot && !e.Holds(s.Running, s.measured().Slots[s.Running].Version) {
		op.Content.Broken = ota.ErrDigest
	}
	if op.Content.Broken != nil && len(steps) > 1 { // its data are needed
		return Step{op.Content.Broken, steps[:len(steps)-1]}
	}
	return Step{Steps: steps}
}

// when returns err if there is reason for it.
func when(reason bool, err error) error {
	if reason {
		return err
	}
	return nil
}

// idle returns why no slot may be touched.
func (s State) idle() error {
	return cmp.Or(when(!s.Committed, ota.ErrNotCommitted), when(s.Active != s.Running, ota.ErrRebootPending))
}

// moot reports whether op, which is not refused, changes nothing.
func (s State) moot(op Op) bool {
	switch op.Kind {
	case Update:
		return op.IgnoreSame && op.Content.Version == s.Slots[s.Running].Version
	case Commit: // once more
		return s.Committed
	case SetBootState:
		return s.patched(op.Patch) == s
	}
	return false
}

// refusal returns what op is refused with at once; of several reasons, the first.
func (s State) refusal(e Env, op Op) error {
	switch op.Kind {
	case Update:
		return cmp.Or(s.idle(), op.Content.Refused,
			when(op.Content.Security < s.Floor, ota.ErrRollback),
			when(!s.moot(op), op.Content.NoRoom))
	case Snapshot:
		return s.idle()
	case Commit:
		last := s.Committed && op.Trial != 0 && op.Trial == s.Trial
		if last && s.Outcome == ota.OutcomeCommitted {
			return nil
		}
		return cmp.Or(
			when(last && s.Outcome == ota.OutcomeReverted || s.Committed && s.Active != s.Running, ota.ErrReverted),
			when(s.Committed, ota.ErrCommitted),
			when(s.Active != s.Running, ota.ErrRebootPending),
			when(op.Trial != 0 && op.Trial != s.Trial, ota.ErrWrongTrial),
			when(s.Booted && s.Timeout > 0 && e.Up >= s.Timeout, ota.ErrExpired))
	case Revert:
		return cmp.Or(when(s.Committed && s.Active != s.Running, ota.ErrReverted), when(s.Committed, ota.ErrCommitted))
	}
	// SetBootState: it is not said which of its own reasons comes first.
	want := s.patched(op.Patch)
	bootable := func(id ota.SlotID) bool { return s.holds(e, id) && s.Slots[id].Security >= s.Floor }
	approved := func(id ota.SlotID) bool { return s.Slots[id].Approved && !s.Slots[id].Rejected }
	slot := func(id ota.SlotID) bool { return id >= 0 && int(id) < e.Slots }
	switch {
	case want.Timeout < 0 || want.Timeout > ota.MaxCommitTimeout || !slot(want.Active) || want.Revert != ota.NoSlot && !slot(want.Revert):
		return ErrRefused
	case want == s:
		return nil
	case s.idle() != nil:
		return s.idle()
	case want.Active != s.Active: // nothing is committed without a trial, and it goes back to what runs
		return when(!bootable(want.Active) || op.Patch.Committed != nil && want.Committed || op.Patch.Revert != nil && want.Revert != s.Running, ErrRefused)
	case want.Revert == ota.NoSlot: // nothing to go back to
		return when(!want.Committed || want.Timeout != s.Timeout, ErrRefused)
	}
	return when(want.Revert == s.Active || !bootable(want.Revert) || !approved(want.Revert) || want.Committed && want.Timeout != s.Timeout, ErrRefused)
}

// patched returns s as p wants it.
func (s State) patched(p ota.BootStatePatch) State {
	set(&s.Active, p.Active)
	set(&s.Revert, p.Revert)
	set(&s.Committed, p.Committed)
	set(&s.Timeout, p.CommitTimeout)
	return s
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// ErrRefused is a refusal of which the model does not say which it is.
var ErrRefused = errors.New("refused")

// Answers reports whether an operation that did st may have returned err.
func (st Step) Answers(err error) bool {
	if st.Err == ErrRefused {
		for _, e := range []error{
			ota.ErrInvalid, ota.ErrUnknownSlot, ota.ErrNoRevert, ota.ErrCommitted,
			ota.ErrRollback, ota.ErrUnverifiedSlot, ota.ErrDigest,
		} {
			if errors.Is(err, e) {
				return true
			}
		}
		return false
	}
	return errors.Is(err, st.Err) && (err == nil) == (st.Err == nil)
}
