package ota

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Bootloader gives access to what decides about the next boot: a boot record of
// the library's own (boot/bootrecord) or the environment of a boot loader.
// [github.com/slotota/ota/boottest] checks any implementation.
//
// A Device calls Store from one goroutine at a time, Load and Running from any.
type Bootloader interface {
	// Running returns the slot whose firmware executes now, found out from the
	// device (kernel command line, program counter, …), never from what was
	// last stored. It does not change until the next boot.
	Running(ctx context.Context) (SlotID, error)
	// Load returns the newest stored state. The error wraps ErrNoBootState if
	// nothing was ever stored and ErrBadBootState if something was, but none
	// of it is valid any more; a read error is returned as such.
	Load(ctx context.Context) (BootState, error)
	// Store makes s the state that the next boot acts on: atomically, and
	// durable when it returns nil. After an error, either state may be stored.
	Store(ctx context.Context, s BootState) error
}

// Healer is an optional interface of a [Bootloader] that keeps its state in
// several copies. Heal loads the state like Load and, before it returns,
// rewrites every copy that is damaged or differs, so that a copy which reads
// well only sometimes can no longer change the outcome. It writes nothing if all
// copies agree.
type Healer interface {
	Heal(ctx context.Context) (BootState, error)
}

// TryLimiter is an optional interface of a [Bootloader] that can count only so many
// boots of a trial. MaxTries returns that number, 0 for no limit; Store of a state
// with more Tries fails.
type TryLimiter interface{ MaxTries() int }

// loadHealed loads the boot state of b, healed if b can.
func loadHealed(ctx context.Context, b Bootloader) (BootState, error) {
	if h, ok := b.(Healer); ok {
		return h.Heal(ctx)
	}
	return b.Load(ctx)
}

// BootState is what a device knows about its slots, and what the next boot acts
// on. Its JSON form is the result of OTA.GetBootState: active_slot,
// is_committed, revert_slot (-1 if there is none) and commit_timeout (whole
// seconds); the other fields are for the device alone.
type BootState struct {
	// Active is the slot that the next boot selects.
	Active SlotID
	// Committed says that the firmware in Active was declared good.
	Committed bool
	// Revert is the slot to go back to while Active is not committed. In a
	// committed state it is information only, and mostly NoSlot.
	Revert SlotID
	// CommitTimeout is the time after the trial boot in which the commit must
	// come, in whole seconds; 0 means that the firmware commits itself once
	// its health checks have passed.
	CommitTimeout time.Duration

	// Trial identifies the trial under way, or the last one.
	Trial TrialID
	// Tries is the number of boots that the trial still has.
	Tries int
	// Booted says that the trial has been handed over to at least once.
	Booted bool
	// Floor is the lowest security version that may become active.
	Floor uint64
	// Slots describes the content of each slot; missing entries are unknown.
	Slots []SlotState
	// Last is the outcome of the last trial.
	Last Result
}

// SlotState is what is known about the content of a slot.
type SlotState struct {
	// Parts has one entry for each part of the slot, in the slot's order. It
	// is empty if the slot does not hold verified firmware, or holds the
	// firmware that the device came with and that was never measured.
	Parts []PartState
	// Security is the security version of the firmware.
	Security uint64
	// Version and BuildID are those of the firmware, at most MaxVersion bytes.
	Version, BuildID string
	// Approved says that this firmware was committed at least once.
	Approved bool
	// Rejected says that a trial of this firmware ended in a revert.
	Rejected bool
}

// MaxVersion is how many bytes of a version or build id a SlotState keeps.
const MaxVersion = 64

// PartState describes the content of one part of a slot.
type PartState struct {
	Size   int64    // bytes, from the start of the part
	SHA256 [32]byte // digest of those bytes
}

// TrialID identifies one trial of one firmware; it is drawn at random when the
// trial is stored. The zero value stands for none.
type TrialID [8]byte

// String returns 16 hexadecimal digits.
func (t TrialID) String() string { return hex.EncodeToString(t[:]) }

// ParseTrialID is the inverse of [TrialID.String].
func ParseTrialID(s string) (TrialID, error) {
	var t TrialID
	if b, err := hex.DecodeString(s); err != nil || copy(t[:], b) != len(t) || len(b) != len(t) {
		return TrialID{}, fmt.Errorf("ota: trial id %s: not 16 hexadecimal digits: %w", Quote(s), ErrInvalid)
	}
	return t, nil
}

// Outcome says how a trial ended.
type Outcome uint8

// The outcomes of a trial.
const (
	OutcomeNone      Outcome = iota // no trial yet, or one is under way
	OutcomeCommitted                // the firmware was committed
	OutcomeReverted                 // the device went back; see Reason
)

// String returns a word for o.
func (o Outcome) String() string { return word(o, "none", "committed", "reverted") }

// Reason says why a trial ended in a revert, or why a slot was left.
type Reason uint8

// The reasons of a revert.
const (
	ReasonNone       Reason = iota
	ReasonRequested         // Revert was called
	ReasonTimeout           // no commit within the commit timeout
	ReasonReset             // the device was reset before the commit
	ReasonHealth            // a health check or first-boot hook failed
	ReasonVerify            // the firmware did not match its digest at boot
	ReasonBootloader        // the boot loader started another slot by itself
	ReasonLost              // the boot state was lost
)

// String returns a short phrase for r.
func (r Reason) String() string {
	return word(r, "none", "requested", "commit timeout", "reset before commit", "health check failed",
		"verification failed at boot", "boot loader fell back", "boot state lost")
}

func word[T ~uint8](v T, words ...string) string {
	if int(v) < len(words) {
		return words[v]
	}
	return fmt.Sprintf("unknown (%d)", v)
}

// Result is the outcome of a trial. It is stored with the boot state, so that
// it can still be read after the reboot.
type Result struct {
	Outcome Outcome
	Reason  Reason
	Trial   TrialID
	Slot    SlotID // the slot whose firmware was on trial
	Message string // detail for people, at most MaxMessage bytes
}

// MaxMessage is how many bytes of a message a Result keeps.
const MaxMessage = 96

// Slot returns the known content of slot id; the zero value if nothing is known.
func (s BootState) Slot(id SlotID) SlotState {
	if id < 0 || int(id) >= len(s.Slots) {
		return SlotState{}
	}
	return s.Slots[id]
}

// setSlot records the content of slot id.
func (s *BootState) setSlot(id SlotID, st SlotState) {
	for len(s.Slots) <= int(id) {
		s.Slots = append(s.Slots, SlotState{})
	}
	s.Slots[id] = st
}

// trial returns the state in which the firmware in active is on trial, with
// revert to go back to.
func (s BootState) trial(active, revert SlotID, timeout time.Duration, tries int) BootState {
	n := s.Clone()
	n.Active, n.Revert, n.Committed = active, revert, false
	n.CommitTimeout, n.Tries, n.Booted = timeout, tries, false
	rand.Read(n.Trial[:]) // never fails
	n.Last = Result{}
	st := n.Slot(active)
	st.Rejected = false
	n.setSlot(active, st)
	return n
}

// committed returns the state in which the firmware on trial has been declared
// good. The security floor rises in the same store, so that no power cut can
// part the two.
func (s BootState) committed() BootState {
	n := s.settled()
	st := n.Slot(s.Active)
	st.Approved, st.Rejected = true, false
	n.setSlot(s.Active, st)
	n.Floor = max(n.Floor, st.Security)
	n.Last = Result{Outcome: OutcomeCommitted, Trial: s.Trial, Slot: s.Active}
	return n
}

// reverted returns the state that goes back to the revert slot. reject marks
// the firmware on trial as bad.
func (s BootState) reverted(why Reason, message string, reject bool) BootState {
	if s.lost() {
		// Nothing says that the other slot is any better.
		return lostState(s.Revert, s.Active, 1)
	}
	n := s.settled()
	n.Active = s.Revert
	n.Last = Result{Outcome: OutcomeReverted, Reason: why, Trial: s.Trial, Slot: s.Active, Message: cut(message, MaxMessage)}
	if reject {
		st := n.Slot(s.Active)
		st.Rejected = true
		n.setSlot(s.Active, st)
	}
	return n
}

// settled returns s with its trial over.
func (s BootState) settled() BootState {
	n := s.Clone()
	n.Committed, n.Revert = true, NoSlot
	n.CommitTimeout, n.Tries, n.Booted = 0, 0, false
	return n
}

// lostState is what stands for a boot state that was lost: which firmware was
// promised is not known, so active is on trial and revert comes next.
func lostState(active, revert SlotID, tries int) BootState {
	s := BootState{Active: active, Revert: revert, Tries: tries, Booted: tries == 0, Last: Result{Reason: ReasonLost}}
	rand.Read(s.Trial[:]) // never fails
	return s
}

// lost reports whether s stands for a boot state that was lost.
func (s BootState) lost() bool { return !s.Committed && s.Last.Reason == ReasonLost }

// checkState reports what in a loaded state does not match the slots.
func checkState(s BootState, slots []Slot) error {
	n := SlotID(len(slots))
	if s.Active < 0 || s.Active >= n || s.Revert < NoSlot || s.Revert >= n || s.Active == s.Revert || len(s.Slots) > len(slots) {
		return fmt.Errorf("boot state with active slot %d, revert slot %d, on a device with %d slots: %w", s.Active, s.Revert, n, ErrUnknownSlot)
	}
	return nil
}

// Clone returns a deep copy of s.
func (s BootState) Clone() BootState {
	s.Slots = slices.Clone(s.Slots)
	for i := range s.Slots {
		s.Slots[i].Parts = slices.Clone(s.Slots[i].Parts)
	}
	return s
}

// Equal reports whether s and t are the same in every field. A missing entry of
// Slots equals an empty one.
func (s BootState) Equal(t BootState) bool {
	for i := range SlotID(max(len(s.Slots), len(t.Slots))) {
		a, b := s.Slot(i), t.Slot(i)
		if !slices.Equal(a.Parts, b.Parts) || a.Security != b.Security || a.Version != b.Version ||
			a.BuildID != b.BuildID || a.Approved != b.Approved || a.Rejected != b.Rejected {
			return false
		}
	}
	return s.Active == t.Active && s.Committed == t.Committed && s.Revert == t.Revert &&
		s.CommitTimeout == t.CommitTimeout && s.Trial == t.Trial && s.Tries == t.Tries &&
		s.Booted == t.Booted && s.Floor == t.Floor && s.Last == t.Last
}

// bootStateJSON is the form of OTA.GetBootState.
type bootStateJSON struct {
	Active        SlotID `json:"active_slot"`
	Committed     bool   `json:"is_committed"`
	Revert        SlotID `json:"revert_slot"`
	CommitTimeout int64  `json:"commit_timeout"`
}

// MarshalJSON encodes the four members of OTA.GetBootState.
func (s BootState) MarshalJSON() ([]byte, error) {
	return json.Marshal(bootStateJSON{s.Active, s.Committed, s.Revert, int64(s.CommitTimeout / time.Second)})
}

// UnmarshalJSON decodes the members of OTA.GetBootState; the other fields are
// left alone.
func (s *BootState) UnmarshalJSON(b []byte) error {
	j := bootStateJSON{s.Active, s.Committed, s.Revert, int64(s.CommitTimeout / time.Second)}
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	if j.CommitTimeout < 0 || j.CommitTimeout > int64(MaxCommitTimeout/time.Second) {
		return fmt.Errorf("ota: commit_timeout %d: need 0 to %d: %w", j.CommitTimeout, MaxCommitTimeout/time.Second, ErrInvalid)
	}
	s.Active, s.Committed, s.Revert = j.Active, j.Committed, j.Revert
	s.CommitTimeout = time.Duration(j.CommitTimeout) * time.Second
	return nil
}

// MaxCommitTimeout bounds commit timeouts.
const MaxCommitTimeout = 30 * 24 * time.Hour

// BootState returns the boot state, as last stored. It does not wait for flash.
func (d *Device) BootState(ctx context.Context) (BootState, error) {
	d.mu.Lock()
	doubt, s := d.doubt, d.state
	d.mu.Unlock()
	if doubt {
		return BootState{}, opErr("bootstate", NoSlot, ErrStateUnknown)
	}
	return s.Clone(), nil
}

// SetBootState changes the boot state within what is safe, and only while the
// running firmware is committed:
//
//   - Active = another slot starts a trial of the firmware there, which must be
//     verified and not below the security floor. Revert, if given, must be the
//     running slot.
//   - Committed = false and Revert = another slot put the running firmware on
//     trial once more, with that slot to go back to. It must be verified, and
//     its firmware must have been committed before and not rejected since.
//   - Revert alone names such a slot, or NoSlot.
//   - CommitTimeout goes with a new trial only.
//
// Nothing can be declared committed this way. A patch that changes nothing
// succeeds. SetBootState does not reboot.
func (d *Device) SetBootState(ctx context.Context, p BootStatePatch) error {
	const op = "setbootstate"
	if err := d.begin(ctx, op, true); err != nil {
		return opErr(op, NoSlot, err)
	}
	defer d.end()
	d.start()
	err := opErr(op, NoSlot, d.setBootState(ctx, p))
	d.finish(op, NoSlot, err)
	return err
}

func (d *Device) setBootState(ctx context.Context, p BootStatePatch) error {
	s := d.current()
	want := s
	if p.Active != nil {
		want.Active = *p.Active
	}
	if p.Committed != nil {
		want.Committed = *p.Committed
	}
	if p.Revert != nil {
		want.Revert = *p.Revert
	}
	var timeout time.Duration
	if p.CommitTimeout != nil {
		t, err := commitTimeout(*p.CommitTimeout)
		if err != nil {
			return err
		}
		timeout, want.CommitTimeout = t, t
	}
	switch {
	case d.slot(want.Active) == nil:
		return &Error{Slot: want.Active, Off: -1, Err: ErrUnknownSlot}
	case want.Revert != NoSlot && d.slot(want.Revert) == nil:
		return &Error{Slot: want.Revert, Off: -1, Err: ErrUnknownSlot}
	case want.Equal(s):
		return nil
	}
	if err := d.idle(s); err != nil {
		return err
	}
	w := d.writer()
	active, revert := d.running, want.Revert
	switch {
	case want.Active != s.Active:
		if p.Committed != nil && *p.Committed {
			return fmt.Errorf("slot %d would be committed without a trial: %w", want.Active, ErrInvalid)
		}
		if p.Revert != nil && *p.Revert != d.running {
			return fmt.Errorf("a trial goes back to the running slot %d, not %d: %w", d.running, *p.Revert, ErrInvalid)
		}
		if err := w.bootable(ctx, s, want.Active); err != nil {
			return err
		}
		want.Committed = false
		active, revert = want.Active, d.running
	case revert == active:
		return fmt.Errorf("slot %d would revert to itself: %w", active, ErrInvalid)
	case want.Committed && p.CommitTimeout != nil && timeout != s.CommitTimeout:
		return fmt.Errorf("a commit timeout needs a trial: %w", ErrCommitted)
	case revert != NoSlot:
		if err := w.revertible(ctx, s, revert); err != nil {
			return err
		}
	case !want.Committed:
		return ErrNoRevert
	}
	next := s.Clone()
	w.id = d.running
	if err := w.measure(ctx, &next); err != nil {
		return err
	}
	if want.Committed {
		next.Revert = revert
	} else {
		next = next.trial(active, revert, timeout, d.o.Tries)
	}
	d.emit(Event{Phase: PhaseStoring, Slot: next.Active})
	return d.store(ctx, next)
}

// revertible verifies that slot id holds firmware that was committed and may
// become active: what a trial goes back to counts as committed at once.
func (w *slotWriter) revertible(ctx context.Context, s BootState, id SlotID) error {
	if st := s.Slot(id); len(st.Parts) > 0 && (!st.Approved || st.Rejected) {
		return &Error{Slot: id, Off: -1, Err: fmt.Errorf("rejected or never committed: %w", ErrUnverifiedSlot)}
	}
	return w.bootable(ctx, s, id)
}

// bootable verifies that slot id holds firmware that may become active.
func (w *slotWriter) bootable(ctx context.Context, s BootState, id SlotID) error {
	st := s.Slot(id)
	if st.Security < s.Floor {
		return &Error{Slot: id, Off: -1, Err: fmt.Errorf("security version %d, need %d: %w", st.Security, s.Floor, ErrRollback)}
	}
	w.id = id
	return opErr("", id, w.in.verifySlot(ctx, &w.d.slots[id], &st))
}
