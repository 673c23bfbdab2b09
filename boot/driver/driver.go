// Package driver makes an [ota.Bootloader] of a boot loader that exists already:
// U-Boot, GRUB, UEFI firmware and so on, each by a [Driver] in a package of its
// own beside this one.
//
// A loader knows which slot comes next, whether it is on trial and perhaps how
// often it was tried. What it has no place for (trial id, commit timeout, digests,
// security floor, outcome) is kept in the library's own record beside it. Two
// stores cannot change at one instant; so that a power cut between them does no
// harm, the loader's own state always decides:
//
//  1. the new state goes into the record "pending",
//  2. the loader's state is changed: from here on the new state counts,
//  3. the new state goes into the record "current".
//
// While the loader does what "current" says, that is the state; a "pending" that
// the loader was never told about means nothing. If the loader does what
// "pending" says instead, the power failed between 2 and 3. If it does what
// neither says, it was changed by another program, and is believed.
//
// Firmware that was rejected and runs may mean two things: the machine was not reset
// since the revert, or it was, and the loader has gone back to this firmware because
// the other one does not start. "pending" has a mark once the other one has run; then
// it is the latter, a fallback like any other, and the device can be updated.
package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/slotota/ota"
)

// Choice is what boot loaders have in common: what the next boot will do.
type Choice struct {
	// Active is the slot that the loader starts next, or, on trial, the slot
	// that it was told to try.
	Active ota.SlotID
	// Trial says that Active is on trial: unless it is confirmed the loader
	// goes back to Revert by itself.
	Trial bool
	// Revert is the slot after a failed trial. Drivers of loaders that do not
	// say return NoSlot.
	Revert ota.SlotID
	// Tries is how many boots the trial still has, as far as the loader
	// counts them.
	Tries int
	// Booted says that the loader has begun the trial.
	Booted bool
	// Worn says that a slot which is not on trial has used up some of its
	// tries, because the loader counts all boots: write the choice again.
	Worn bool
}

// Driver reads and writes the state of one boot loader. Read and Write are not
// called concurrently; Running may be at any time. Every method gives up when ctx
// is done, but a Write that has begun to change something may complete first.
type Driver interface {
	// Running returns the slot whose firmware executes now, found out from
	// the kernel's side, never from the loader's intention. It does not change
	// until the next boot.
	Running(ctx context.Context) (ota.SlotID, error)
	// Read returns what the next boot will do. A trial that the loader has given
	// up is either still reported, with Booted and no Tries, or replaced by the
	// choice of the slot it went back to. The error wraps [ota.ErrNoBootState]
	// if the loader has no state yet and would start its default.
	Read(ctx context.Context) (Choice, error)
	// Write makes c what the next boot does: atomically, and durable and read
	// back when it returns nil. After an error either choice may be stored. A
	// Write of what is stored already, Booted and Tries included, may do nothing.
	// Trials with more Tries than the loader can count wrap [ota.ErrInvalid].
	Write(ctx context.Context, c Choice) error
}

// Answer says how a loader reacts to a failure of the firmware on trial.
type Answer string

// The answers.
const (
	Yes      Answer = "yes"           // it goes back by itself
	IfReset  Answer = "if it resets"  // it goes back once the machine is reset: panic=N on the command line
	Watchdog Answer = "with watchdog" // it goes back if a hardware watchdog resets the machine
	No       Answer = "no"            // somebody must cut the power
)

// Capabilities say what a boot loader can do by itself.
type Capabilities struct {
	Loader string // name for people
	// MaxTries is how many boots a trial can have; 0 means any number.
	MaxTries int
	// ConfirmEveryBoot says that the loader counts boots of committed slots
	// too: [Bootloader.Heal], which ota.Open calls, resets the counter.
	ConfirmEveryBoot bool
	// OnPanic, OnHang and OnUnloadable say what happens after a kernel panic,
	// after a hang before any user program runs, and if the kernel cannot be
	// loaded.
	OnPanic, OnHang, OnUnloadable Answer
	// Copies is in how many places the loader keeps its state, if a write that is
	// cut off can damage one of them; 0 if it cannot, or if that is not known. With
	// one copy all of the state can be lost.
	Copies int
	// RebootArg is what the restart system call must be given to begin a trial,
	// "" for an ordinary restart.
	RebootArg string
	// Note is a sentence about what else there is to know.
	Note string
}

// Capable is an optional interface of a [Driver].
type Capable interface{ Capabilities() Capabilities }

// Bootloader is an [ota.Bootloader], [ota.Healer] and [ota.TryLimiter]. It is safe for concurrent use.
// One process at a time may use it.
type Bootloader struct {
	d            Driver
	current, new ota.Bootloader
	sem          chan struct{}
}

// New returns the boot loader that d drives. The records current and pending are of
// the library's own (boot/bootrecord), in places of their own.
func New(d Driver, current, pending ota.Bootloader) (*Bootloader, error) {
	if d == nil || current == nil || pending == nil || current == pending {
		return nil, fmt.Errorf("driver: need a driver and two different records: %w", ota.ErrInvalid)
	}
	return &Bootloader{d: d, current: current, new: pending, sem: make(chan struct{}, 1)}, nil
}

// Capabilities returns those of the driver, the zero value if it does not say.
func (b *Bootloader) Capabilities() Capabilities {
	if c, ok := b.d.(Capable); ok {
		return c.Capabilities()
	}
	return Capabilities{}
}

// MaxTries implements [ota.TryLimiter].
func (b *Bootloader) MaxTries() int { return b.Capabilities().MaxTries }

// Running implements [ota.Bootloader].
func (b *Bootloader) Running(ctx context.Context) (ota.SlotID, error) { return b.d.Running(ctx) }

func (b *Bootloader) acquire(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case b.sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *Bootloader) release() { <-b.sem }

// Load implements [ota.Bootloader].
func (b *Bootloader) Load(ctx context.Context) (ota.BootState, error) {
	if err := b.acquire(ctx); err != nil {
		return ota.BootState{}, err
	}
	defer b.release()
	v, err := b.look(ctx, ota.Bootloader.Load)
	return v.state, err
}

// Heal implements [ota.Healer]. It completes what a power cut has interrupted, and
// gives a committed slot its tries back if the loader counts every boot.
func (b *Bootloader) Heal(ctx context.Context) (ota.BootState, error) {
	if err := b.acquire(ctx); err != nil {
		return ota.BootState{}, err
	}
	defer b.release()
	v, err := b.look(ctx, heal)
	factory := errors.Is(err, ota.ErrNoBootState)
	if err != nil && !factory {
		return v.state, err
	}
	// A device as it came from the factory has a loader that counts, too.
	confirmed := v.choice
	if !factory {
		confirmed = want(v.state)
	}
	if v.choice.Worn && !confirmed.Trial {
		// Only firmware that runs has shown that it boots.
		if id, rerr := b.d.Running(ctx); rerr == nil && id == confirmed.Active {
			if werr := b.write(ctx, Choice{Active: id, Revert: ota.NoSlot}); werr != nil {
				return v.state, werr
			}
		}
	}
	if factory {
		return v.state, err
	}
	switch {
	case v.fromNew:
		return v.state, b.current.Store(ctx, v.state)
	case !v.arrived && v.leftRejected() && b.runs(ctx, v.state.Active):
		mark := v.state.Clone()
		mark.Booted = true
		return v.state, b.new.Store(ctx, mark)
	case v.stale:
		// A trial that the loader was never told about must not be taken for
		// one that it has begun, however the firmware there came to run.
		return v.state, b.new.Store(ctx, v.state)
	}
	return v.state, nil
}

func heal(b ota.Bootloader, ctx context.Context) (ota.BootState, error) {
	if h, ok := b.(ota.Healer); ok {
		return h.Heal(ctx)
	}
	return b.Load(ctx)
}

// Store implements [ota.Bootloader].
func (b *Bootloader) Store(ctx context.Context, s ota.BootState) error {
	if s.Active < 0 || s.Active >= ota.MaxSlots || s.Revert < ota.NoSlot || s.Revert >= ota.MaxSlots {
		return fmt.Errorf("driver: active slot %d, revert slot %d: %w", s.Active, s.Revert, ota.ErrUnknownSlot)
	}
	if most := b.MaxTries(); most > 0 && s.Tries > most {
		return fmt.Errorf("driver: %d tries, the boot loader can count to %d: %w", s.Tries, most, ota.ErrInvalid)
	}
	if err := b.acquire(ctx); err != nil {
		return err
	}
	defer b.release()
	v, err := b.look(ctx, ota.Bootloader.Load)
	if err != nil && !errors.Is(err, ota.ErrNoBootState) && !errors.Is(err, ota.ErrBadBootState) {
		return err
	}
	c := want(s)
	if err == nil && !v.fromNew && same(v.choice, c) && !v.choice.Worn {
		return b.current.Store(ctx, s)
	}
	if err == nil && v.fromNew {
		// "pending" holds the only copy of what counts.
		if err := b.current.Store(ctx, v.state); err != nil {
			return err
		}
	}
	if err := b.new.Store(ctx, s); err != nil {
		return err
	}
	if err := b.write(ctx, c); err != nil {
		return err
	}
	return b.current.Store(ctx, s)
}

// write has the driver write c and makes sure that it did.
func (b *Bootloader) write(ctx context.Context, c Choice) error {
	if err := b.d.Write(ctx, c); err != nil {
		return err
	}
	got, err := b.d.Read(ctx)
	if err == nil && !does(got, c) {
		err = fmt.Errorf("driver: the boot loader did not keep what was stored: %w", ota.ErrStateUnknown)
	}
	return err
}

// view is what the two records and the loader say together.
type view struct {
	state   ota.BootState
	choice  Choice
	fromNew bool // "current" has to catch up
	stale   bool // "pending" is a trial that never was
	arrived bool // "pending" says that the active slot has run since the last change
}

// leftRejected reports whether the state is one after the end of a trial.
func (v view) leftRejected() bool {
	for id := range v.state.Slots {
		if v.state.Slots[id].Rejected && ota.SlotID(id) != v.state.Active {
			return v.state.Committed
		}
	}
	return false
}

func (b *Bootloader) look(ctx context.Context, load func(ota.Bootloader, context.Context) (ota.BootState, error)) (v view, err error) {
	cur, cerr := load(b.current, ctx)
	if !known(cerr) {
		return v, cerr
	}
	next, nerr := load(b.new, ctx)
	if !known(nerr) {
		return v, nerr
	}
	v.choice, err = b.d.Read(ctx)
	none := errors.Is(err, ota.ErrNoBootState)
	if err != nil && !none {
		return v, err
	}
	c := v.choice
	switch {
	case none && cerr == nil:
		// Its state was reset to nothing, which no store of ours does.
		return v, fmt.Errorf("driver: the boot loader has lost its state: %w", ota.ErrBadBootState)
	case none:
		return v, cerr
	case cerr == nil && does(c, want(cur)):
		// A trial that can be begun only once leaves no trace but that its
		// firmware runs.
		unfinished := nerr == nil && !next.Committed && next.Trial != cur.Trial
		if unfinished && gaveUp(c, next) && b.runs(ctx, next.Active) {
			return v.take(next, true), nil
		}
		v.stale = unfinished
		v.arrived = nerr == nil && next.Committed && next.Booted && next.Active == cur.Active
		v = v.take(cur, false)
		if v.arrived && v.leftRejected() {
			if id, err := b.d.Running(ctx); err == nil && id != cur.Active && cur.Slot(id).Rejected {
				v.state = cur.Clone()
				v.state.Slots[id].Rejected = false
			}
		}
		return v, nil
	case nerr == nil && does(c, want(next)):
		return v.take(next, true), nil
	case cerr == nil && gaveUp(c, cur):
		return v.take(cur, false), nil
	case nerr == nil && gaveUp(c, next) && b.runs(ctx, next.Active):
		return v.take(next, true), nil
	case cerr != nil:
		return v, cerr
	}
	// Another program has told the loader what to do.
	s := cur.Clone()
	s.Active, s.Revert, s.Committed = c.Active, ota.NoSlot, !c.Trial
	s.CommitTimeout, s.Trial, s.Tries, s.Booted = 0, ota.TrialID{}, 0, false
	if c.Trial {
		s.Revert, s.Tries, s.Booted = c.Revert, c.Tries, c.Booted
		if s.Revert == ota.NoSlot && cur.Active != c.Active {
			s.Revert = cur.Active
		}
	}
	v.state = s
	return v, nil
}

// known reports whether err says something about a record, rather than that it
// could not be read.
func known(err error) bool {
	return err == nil || errors.Is(err, ota.ErrNoBootState) || errors.Is(err, ota.ErrBadBootState)
}

func (b *Bootloader) runs(ctx context.Context, id ota.SlotID) bool {
	got, err := b.d.Running(ctx)
	return err == nil && got == id
}

// take returns v with state s, brought up to date with what the loader did.
func (v view) take(s ota.BootState, fromNew bool) view {
	v.fromNew = fromNew
	v.state = s
	switch c := v.choice; {
	case s.Committed:
		v.state.Booted = false // in "pending" it is a mark
	case !c.Trial:
		v.state.Booted, v.state.Tries = true, 0
	case c.Booted:
		v.state.Booted, v.state.Tries = true, min(s.Tries, c.Tries)
	}
	return v
}

// want returns what the loader must do in state s.
func want(s ota.BootState) Choice {
	if s.Committed {
		return Choice{Active: s.Active, Revert: ota.NoSlot}
	}
	return Choice{Active: s.Active, Trial: true, Revert: s.Revert, Tries: s.Tries, Booted: s.Booted}
}

// does reports whether a loader in state c carries out w, or has begun to.
func does(c, w Choice) bool {
	if w.Trial && !c.Trial {
		// A trial that has used up its tries may be forgotten.
		return w.Booted && w.Tries == 0 && c.Active == w.Revert
	}
	return c.Active == w.Active && c.Trial == w.Trial &&
		(!c.Trial || c.Revert == w.Revert || c.Revert == ota.NoSlot)
}

// same reports whether writing w would change nothing.
func same(c, w Choice) bool {
	return does(c, w) && (!c.Trial || c.Booted == w.Booted && c.Tries == w.Tries)
}

// gaveUp reports whether a loader in state c may have tried what s says, and gone
// back.
func gaveUp(c Choice, s ota.BootState) bool {
	return !s.Committed && !c.Trial && c.Active == s.Revert
}
