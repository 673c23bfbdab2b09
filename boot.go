package ota

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// BootOptions configure [Boot]. The zero value is safe.
type BootOptions struct {
	// Order says which slots to try if no boot state can be read; nil means
	// the read-only slots first, then the others, by number. It names two at
	// least, and none twice.
	Order []SlotID
	// Check is asked about a slot after its digests have matched, to check
	// whatever the image format itself provides. An error counts as a failed
	// verification. It may be nil.
	Check func(ctx context.Context, id SlotID) error
	// BufferSize is the size of each of the two read buffers; 0 leaves it to the
	// medium and is 512 KiB at most.
	BufferSize int
}

// Handover is the decision of [Boot].
type Handover struct {
	// Slot is to be started.
	Slot SlotID
	// State is the boot state at the handover.
	State BootState
	// FirstBoot says that this is the first boot of a firmware on trial.
	FirstBoot bool
	// Verified says that the slot was held against known digests. It is false
	// only for firmware that was never measured: what the device came with,
	// or after the boot state was lost.
	Verified bool
	// Problem is what went wrong without preventing the boot, or nil.
	Problem error
}

// Boot decides which slot to start. It is for the boot stage of a device whose
// boot loader is written in Go (an initramfs, a kexec loader, a bare-metal
// loader), and is called once, before anything of a slot runs:
//
//  1. The boot state is loaded and healed.
//  2. A committed firmware is verified and started; if it is damaged, another
//     one that was committed before and is not below the security floor.
//  3. A firmware on trial is verified, one of its boots is used up, durably,
//     and it is started.
//  4. If there is no boot left, or it does not verify, the device goes back to
//     the revert slot, durably.
//
// If no boot state was ever stored the first slot of the order that Check accepts
// is started as it is. If the state was lost, the slots of the order are tried in turn until one
// is committed. If the boot state cannot be written the revert slot is started
// all the same, never a trial. The error wraps ErrNotBootable if no slot may be
// started, or if the boot state cannot be read; that is the moment for a recovery
// system. Firmware that a trial has ended for, or that was never committed, is not
// a reserve: it is not started even then.
func Boot(ctx context.Context, b Bootloader, slots []Slot, o *BootOptions) (Handover, error) {
	if o == nil {
		o = &BootOptions{}
	}
	h, err := boot(ctx, b, slots, o)
	return h, opErr("boot", NoSlot, err)
}

func boot(ctx context.Context, b Bootloader, slots []Slot, o *BootOptions) (Handover, error) {
	if err := checkSlots(slots); err != nil {
		return Handover{}, err
	}
	order, err := bootOrder(slots, o.Order)
	if err != nil {
		return Handover{}, err
	}
	p := &booter{b: b, slots: slots, order: order, check: o.Check, in: newInstaller(o.BufferSize, nil, nil)}
	s, err := loadHealed(ctx, b)
	if err == nil {
		err = checkState(s, slots)
	}
	switch {
	case err == nil:
	case errors.Is(err, ErrNoBootState):
		return p.first(ctx)
	case errors.Is(err, ErrBadBootState):
		s = lostState(order[0], order[1], 1)
	case ctx.Err() != nil:
		return Handover{}, ctx.Err()
	default:
		p.note(err)
		return Handover{}, p.notBootable()
	}
	return p.decide(ctx, s)
}

// bootOrder returns the order in which slots are tried without a boot state.
func bootOrder(slots []Slot, order []SlotID) ([]SlotID, error) {
	if order != nil {
		for i, id := range order {
			if id < 0 || int(id) >= len(slots) {
				return nil, &Error{Slot: id, Off: -1, Err: ErrUnknownSlot}
			}
			if slices.Contains(order[:i], id) {
				return nil, fmt.Errorf("boot order: slot %d twice: %w", id, ErrInvalid)
			}
		}
		if len(order) < 2 {
			return nil, fmt.Errorf("boot order: need two slots: %w", ErrInvalid)
		}
		return order, nil
	}
	for _, readOnly := range []bool{true, false} {
		for i := range slots {
			if slots[i].ReadOnly == readOnly {
				order = append(order, SlotID(i))
			}
		}
	}
	return order, nil
}

// booter carries out the boot step.
type booter struct {
	b        Bootloader
	slots    []Slot
	order    []SlotID
	check    func(context.Context, SlotID) error
	in       *installer
	problems []error
}

// first starts the first slot of the order that the caller's check accepts.
func (p *booter) first(ctx context.Context) (Handover, error) {
	for _, id := range p.order {
		s := BootState{Active: id, Committed: true, Revert: NoSlot}
		if _, err := p.verify(ctx, s, id, true); err == nil {
			return p.start(s, id, false, false), nil
		} else {
			p.note(err)
		}
	}
	return Handover{}, p.notBootable()
}

// decide acts on s, which every copy of the boot record holds.
func (p *booter) decide(ctx context.Context, s BootState) (Handover, error) {
	// A lost state may go through all slots; nothing else repeats.
	for range len(p.order) + 1 {
		if s.Committed {
			return p.committed(ctx, s)
		}
		why, message := ReasonReset, ""
		if s.Tries > 0 {
			verified, err := p.verify(ctx, s, s.Active, s.lost())
			if err == nil {
				return p.try(ctx, s, verified)
			}
			if ctx.Err() != nil {
				return Handover{}, ctx.Err()
			}
			p.note(err)
			why, message = ReasonVerify, err.Error()
		}
		if s.Revert == NoSlot {
			return Handover{}, p.notBootable()
		}
		if s.lost() {
			next := p.after(s.Active)
			s = lostState(next, p.after(next), 1)
		} else {
			s = s.reverted(why, message, true)
		}
		if err := storeState(ctx, p.b, s); err != nil {
			p.note(err) // the next boot comes to the same decision
		}
	}
	return Handover{}, p.notBootable()
}

// after returns the slot that follows id in the order, going round.
func (p *booter) after(id SlotID) SlotID {
	return p.order[(slices.Index(p.order, id)+1)%len(p.order)]
}

// try uses up one boot of the trial in s and starts it.
func (p *booter) try(ctx context.Context, s BootState, verified bool) (Handover, error) {
	next := s.Clone()
	next.Tries--
	next.Booted = true
	err := storeState(ctx, p.b, next)
	if err == nil || s.lost() {
		p.note(err)
		return p.start(next, s.Active, !s.Booted, verified), nil
	}
	// A boot that cannot be counted must not be made.
	p.note(err)
	if s.Revert == NoSlot {
		return Handover{}, p.notBootable()
	}
	h, err := p.committed(ctx, s.reverted(ReasonNone, "", true))
	h.State = s
	return h, err
}

// committed starts the active slot of s, or what can take its place.
func (p *booter) committed(ctx context.Context, s BootState) (Handover, error) {
	verified, err := p.verify(ctx, s, s.Active, true)
	if err == nil {
		return p.start(s, s.Active, false, verified), nil
	}
	for i := range p.slots {
		if ctx.Err() != nil {
			return Handover{}, ctx.Err()
		}
		id := SlotID(i)
		st := s.Slot(id)
		if id == s.Active || !st.Approved || st.Rejected || st.Security < s.Floor {
			continue
		}
		if _, ferr := p.verify(ctx, s, id, false); ferr != nil {
			p.note(ferr)
			continue
		}
		p.note(err)
		s.Revert = id
		s = s.reverted(ReasonVerify, err.Error(), true)
		p.note(storeState(ctx, p.b, s))
		return p.start(s, id, false, true), nil
	}
	p.note(err)
	return Handover{}, p.notBootable()
}

// verify checks slot id against its digests, and reports whether there were
// any. unknown allows that there are none. What fails is tried again: one bad
// read must not decide about a firmware.
func (p *booter) verify(ctx context.Context, s BootState, id SlotID, unknown bool) (verified bool, err error) {
	for range verifyTries {
		if verified, err = p.verifyOnce(ctx, s, id, unknown); err == nil || ctx.Err() != nil {
			break
		}
	}
	return verified, opErr("", id, err)
}

// verifyTries is how often a slot is verified at most.
const verifyTries = 3

func (p *booter) verifyOnce(ctx context.Context, s BootState, id SlotID, unknown bool) (verified bool, err error) {
	st := s.Slot(id)
	switch {
	case len(st.Parts) == 0 && unknown:
	case st.Security < s.Floor && !s.Committed:
		err = ErrRollback
	default:
		verified = true
		err = p.in.verifySlot(ctx, &p.slots[id], &st)
	}
	if err == nil && p.check != nil {
		err = p.check(ctx, id)
	}
	return verified, err
}

func (p *booter) start(s BootState, id SlotID, first, verified bool) Handover {
	return Handover{Slot: id, State: s, FirstBoot: first, Verified: verified, Problem: errors.Join(p.problems...)}
}

// note remembers what went wrong.
func (p *booter) note(err error) {
	if err != nil {
		p.problems = append(p.problems, err)
	}
}

func (p *booter) notBootable() error {
	return fmt.Errorf("%w: %w", ErrNotBootable, errors.Join(p.problems...))
}
