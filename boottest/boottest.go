// Package boottest checks implementations of [ota.Bootloader], as
// testing/slogtest does those of slog.Handler.
//
// A bootloader that keeps its state on [ota.Flash] should be checked on a
// simulated chip, by [OnChip]: then the storage fails, too. Package crashtest goes
// further, with every way to cut the power, and several cuts in one run.
package boottest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/slotota/ota"
)

// Violation is a rule that a Bootloader breaks. The rules are:
//
//	none          Load of storage never written wraps ota.ErrNoBootState
//	first-store   until the first Store is complete, and whatever interrupts it,
//	              Load wraps ota.ErrNoBootState or returns that state
//	store         Store succeeds, also before any Load
//	round-trip    Load returns all fields as they were stored
//	durable       so it does after a restart
//	atomic        after a Store that was interrupted or failed Load returns the
//	              old or the new state, always the same, and Store works again
//	dropped       a Store of which the storage has silently lost a part fails, or
//	              its state is found after a restart
//	read-error    a state that cannot be read is never reported as not stored, nor
//	              replaced by an older one
//	running       Running returns a slot, the same until the next boot, whatever
//	              is stored; or its error wraps ota.ErrUnsupported
//	unknown-slot  Store refuses slots that no device has, and changes nothing
//	alias         a state stored or loaded shares no memory with the bootloader
//	concurrent    Load and Running work beside each other and beside a Store
//	heal          Heal, if there is one, returns what Load returns
//	context       once its context has ended Store succeeds or returns the
//	              context's error
//	panic         no method panics
//
// Only the first breach of each rule is reported.
type Violation struct {
	Rule string
	Err  error
}

// Error returns rule and breach.
func (v *Violation) Error() string { return "boottest: rule " + v.Rule + ": " + v.Err.Error() }

// Unwrap returns v.Err.
func (v *Violation) Unwrap() error { return v.Err }

// Fault is something that goes wrong with the storage of a bootloader.
type Fault int

// The faults. Operations are those that change storage, or sync it.
const (
	Cut      Fault = iota // the operation is torn by a power cut; nothing works after it
	Fail                  // the operation fails, later ones work
	Drop                  // the operation does nothing and reports success
	FailRead              // a read fails, later ones work
)

// Faulter is an optional interface of a Bootloader under test: its storage can be
// made to fail. Without it the rules first-store, atomic, dropped and read-error
// are not checked. See [OnChip].
type Faulter interface {
	// Fault has operation or read number n from now on, counted from 0, go
	// wrong. The function returned ends that, restores the power, and reports
	// whether there was an operation n.
	Fault(k Fault, n int) (end func() (struck bool))
}

// Run checks the bootloader that open returns, as [Check] does. open is called
// once for each restart of the device, and fails the test if there is none.
func Run(t *testing.T, open func(*testing.T) ota.Bootloader) {
	t.Helper()
	err := Check(t.Context(), func() (ota.Bootloader, error) { return open(t), nil })
	if err != nil {
		t.Error(err)
	}
}

// Check checks a bootloader and returns the rules that it breaks:
// [*Violation]s, joined. open is called once for each restart of the device, and
// returns the bootloader of the same storage, to which nothing was stored at the
// first call. The bootloader may be used no more after the next call.
func Check(ctx context.Context, open func() (ota.Bootloader, error)) error {
	c := &check{ctx: ctx, open: open}
	for _, step := range []func(){c.none, c.firstStore, c.roundTrip, c.alias, c.unknownSlot, c.running,
		c.concurrent, c.context, c.atomic, c.dropped, c.readErrors} {
		c.guard(step)
		if c.stop || ctx.Err() != nil {
			break
		}
	}
	if err := ctx.Err(); err != nil {
		c.errs = append(c.errs, err)
	}
	return errors.Join(c.errs...)
}

type check struct {
	ctx    context.Context
	open   func() (ota.Bootloader, error)
	b      ota.Bootloader
	errs   []error
	broken map[string]bool
	stop   bool // the rest is pointless
}

// maxOps bounds the operations of one Store.
const maxOps = 1000

func (c *check) fail(rule, format string, args ...any) {
	if c.broken[rule] {
		return
	}
	if c.broken == nil {
		c.broken = map[string]bool{}
	}
	c.broken[rule] = true
	c.errs = append(c.errs, &Violation{rule, fmt.Errorf(format, args...)})
}

func (c *check) guard(step func()) {
	defer func() {
		if p := recover(); p != nil {
			c.fail("panic", "%v", p)
			c.stop = true
		}
	}()
	step()
}

// restart opens the bootloader anew.
func (c *check) restart() bool {
	b, err := c.open()
	if err == nil && b == nil {
		err = errors.New("no bootloader")
	}
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("boottest: opening: %w", err))
		c.stop = true
		return false
	}
	c.b = b
	return true
}

// states are examples that use all fields, up to their limits, and differ.
func (c *check) states() []ota.BootState {
	tries := 3
	if l, ok := c.b.(ota.TryLimiter); ok && l.MaxTries() > 0 {
		tries = min(tries, l.MaxTries())
	}
	none := ota.Result{Slot: ota.NoSlot}
	full := func(seed byte, v string) ota.SlotState {
		s := ota.SlotState{Security: uint64(seed), Version: v, BuildID: strings.Repeat("b", ota.MaxVersion), Approved: true}
		for i := range byte(ota.MaxParts) {
			s.Parts = append(s.Parts, ota.PartState{Size: 1<<40 + int64(i), SHA256: [32]byte{seed, i, 31: 0xff}})
		}
		return s
	}
	return []ota.BootState{
		{Active: 0, Committed: true, Revert: ota.NoSlot, Last: none},
		{Active: 1, Revert: 0, CommitTimeout: ota.MaxCommitTimeout, Trial: ota.TrialID{1, 2, 3, 4, 5, 6, 7, 8}, Tries: tries, Floor: 7,
			Slots: []ota.SlotState{full(1, strings.Repeat("v", ota.MaxVersion)), full(2, "2.0 é")}, Last: none},
		{Active: 1, Revert: 0, Booted: true, Trial: ota.TrialID{0xff, 7: 0xff}, Floor: math.MaxUint64,
			Slots: []ota.SlotState{{}, {Rejected: true, Parts: []ota.PartState{{}}}}, Last: none},
		{Active: 0, Committed: true, Revert: 1, Slots: []ota.SlotState{full(9, "9")}, Last: ota.Result{
			Outcome: ota.OutcomeReverted, Reason: ota.ReasonHealth, Trial: ota.TrialID{9}, Slot: 1,
			Message: strings.Repeat("m", ota.MaxMessage)}},
		{Active: 1, Committed: true, Revert: ota.NoSlot, Trial: ota.TrialID{5}, Last: ota.Result{
			Outcome: ota.OutcomeCommitted, Trial: ota.TrialID{5}, Slot: 1}},
	}
}

func (c *check) store(rule string, s ota.BootState) bool {
	err := c.b.Store(c.ctx, s.Clone())
	if err != nil {
		c.fail(rule, "storing %s: %w", brief(s), err)
	}
	return err == nil
}

// expect loads the state and blames rule if it is not one of want.
func (c *check) expect(rule, when string, want ...ota.BootState) (ota.BootState, bool) {
	got, err := c.b.Load(c.ctx)
	if err != nil {
		c.fail(rule, "loading %s: %w", when, err)
		return got, false
	}
	if !slices.ContainsFunc(want, got.Equal) {
		c.fail(rule, "%s: loaded %s, not %s", when, brief(got), brief(want[len(want)-1]))
		return got, false
	}
	return got, true
}

// brief returns the fields of s, digests left out.
func brief(s ota.BootState) string {
	t := s.Clone()
	for i := range t.Slots {
		t.Slots[i].Parts = nil
	}
	return fmt.Sprintf("%+v (%d slots)", struct {
		Active, Revert ota.SlotID
		Committed      bool
		Trial          ota.TrialID
		Tries          int
		Floor          uint64
		Timeout        any
		Last           any
	}{s.Active, s.Revert, s.Committed, s.Trial, s.Tries, s.Floor, s.CommitTimeout, s.Last}, len(s.Slots))
}

func (c *check) none() {
	if !c.restart() {
		return
	}
	s, err := c.b.Load(c.ctx)
	switch {
	case err == nil:
		c.fail("none", "loaded %s, want an error that wraps ota.ErrNoBootState", brief(s))
	case !errors.Is(err, ota.ErrNoBootState):
		c.fail("none", "want an error that wraps ota.ErrNoBootState: %w", err)
	}
	if h, ok := c.b.(ota.Healer); ok {
		if _, err := h.Heal(c.ctx); !errors.Is(err, ota.ErrNoBootState) {
			c.fail("heal", "nothing is stored yet, want an error that wraps ota.ErrNoBootState, not: %v", err)
		}
	}
}

func (c *check) firstStore() {
	s := c.states()[1]
	complete := false
	c.faults(Cut, "first-store", nil, func() error { return c.b.Store(c.ctx, s.Clone()) }, func(when string, err error) bool {
		complete = complete || err == nil
		got, err := c.b.Load(c.ctx)
		switch {
		case err == nil && got.Equal(s):
			complete = true
		case err == nil:
			c.fail("first-store", "%s: loaded %s, not %s", when, brief(got), brief(s))
		case complete:
			c.fail("first-store", "%s, but complete before: %w", when, err)
		case !errors.Is(err, ota.ErrNoBootState):
			c.fail("first-store", "%s: want an error that wraps ota.ErrNoBootState: %w", when, err)
		}
		return !c.broken["first-store"]
	})
}

func (c *check) roundTrip() {
	if !c.restart() {
		return
	}
	all := c.states()
	for _, s := range append(all, all[0], all[0]) {
		// Not loaded before, not loaded between.
		if !c.restart() || !c.store("store", s) {
			break
		}
		if _, ok := c.expect("round-trip", "what was stored", s); !ok {
			break
		}
		if !c.restart() {
			return
		}
		if _, ok := c.expect("durable", "after a restart", s); !ok {
			break
		}
		if h, ok := c.b.(ota.Healer); ok {
			got, err := h.Heal(c.ctx)
			if err != nil || !got.Equal(s) {
				c.fail("heal", "returned %s (%v) instead of %s", brief(got), err, brief(s))
			}
			c.expect("heal", "after Heal", s)
		}
	}
	c.store("store", all[1])
	c.store("store", all[2])
	c.expect("round-trip", "after two stores", all[2])
	c.stop = c.stop || len(c.errs) > 0 && (c.broken["store"] || c.broken["round-trip"] || c.broken["durable"])
}

func (c *check) alias() {
	want := c.states()[1]
	s := want.Clone()
	if err := c.b.Store(c.ctx, s); err != nil {
		c.fail("store", "%w", err)
		return
	}
	if !s.Equal(want) {
		c.fail("alias", "Store has changed the state it was given")
	}
	s.Slots[0].Version = "changed"
	s.Slots[0].Parts[0].Size++
	got, ok := c.expect("alias", "after the state that was stored was changed", want)
	if !ok {
		return
	}
	got.Slots[0].Version = "changed"
	got.Slots[0].Parts[0].Size++
	c.expect("alias", "after the state that was loaded was changed", want)
}

func (c *check) unknownSlot() {
	good := c.states()[4]
	c.store("store", good)
	for _, id := range []ota.SlotID{ota.MaxSlots, -2, 1 << 16} {
		for _, bad := range []ota.BootState{{Active: id, Revert: 0, Last: good.Last}, {Active: 0, Revert: id, Last: good.Last}} {
			if err := c.b.Store(c.ctx, bad); err == nil {
				c.fail("unknown-slot", "active slot %d, revert slot %d: not refused", bad.Active, bad.Revert)
			}
			if _, ok := c.expect("unknown-slot", "after a state with an unknown slot was refused", good); !ok {
				return
			}
		}
	}
}

func (c *check) running() {
	first, err := c.b.Running(c.ctx)
	switch {
	case errors.Is(err, ota.ErrUnsupported):
	case err != nil:
		c.fail("running", "%w", err)
		return
	case first < 0 || first >= ota.MaxSlots:
		c.fail("running", "slot %d", first)
	}
	for _, s := range c.states() {
		c.store("store", s)
		again, rerr := c.b.Running(c.ctx)
		if again != first || (rerr == nil) != (err == nil) {
			c.fail("running", "was slot %d (%v), is slot %d (%v) since %s was stored", first, err, again, rerr, brief(s))
			return
		}
	}
}

func (c *check) concurrent() {
	all := c.states()
	c.store("store", all[0])
	var wg sync.WaitGroup
	var mu sync.Mutex
	complain := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		c.fail("concurrent", format, args...)
	}
	for range 4 {
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					complain("panic: %v", p)
				}
			}()
			for range 20 {
				got, err := c.b.Load(c.ctx)
				switch {
				case err != nil:
					complain("loading beside Store: %w", err)
				case !slices.ContainsFunc(all, got.Equal):
					complain("loaded beside Store: %s, which was never stored", brief(got))
				}
				if _, err := c.b.Running(c.ctx); err != nil && !errors.Is(err, ota.ErrUnsupported) {
					complain("running slot: %w", err)
				}
			}
		})
	}
	for i := range 10 {
		if err := c.b.Store(c.ctx, all[i%len(all)]); err != nil {
			complain("storing beside Load: %w", err)
		}
	}
	wg.Wait()
	c.expect("concurrent", "after the last store", all[9%len(all)])
}

func (c *check) context() {
	all := c.states()
	c.store("store", all[0])
	ctx, cancel := context.WithCancel(c.ctx)
	cancel()
	err := c.b.Store(ctx, all[1])
	want := all[:2]
	switch {
	case err == nil:
		want = all[1:2]
	case !errors.Is(err, context.Canceled):
		c.fail("context", "storing, with a context that has ended: %w", err)
	}
	if _, err := c.b.Load(ctx); err != nil && !errors.Is(err, context.Canceled) {
		c.fail("context", "loading, with a context that has ended: %w", err)
	}
	if c.restart() {
		c.expect("context", "after a store with a context that has ended", want...)
	}
}

// faults has operation 0, 1, … of do go wrong, restarts the device, and calls
// then with what do returned, until there is no such operation. Before each
// round older is stored, unless it is nil.
func (c *check) faults(k Fault, rule string, older *ota.BootState, do func() error, then func(when string, err error) bool) {
	for n := 0; c.restart(); n++ {
		f, ok := c.b.(Faulter)
		if !ok || older != nil && !c.store(rule, *older) {
			return
		}
		if n == maxOps {
			c.fail(rule, "more than %d operations on storage", n)
			return
		}
		end := f.Fault(k, n)
		err := do()
		struck := end()
		if !struck && err != nil {
			c.fail(rule, "without a fault: %w", err)
			return
		}
		if !c.restart() {
			return
		}
		what := [...]string{"a power cut at operation %d", "a failure of operation %d", "the loss of operation %d", "a failure of read %d"}[k]
		if !then("after "+fmt.Sprintf(what, n), err) || !struck {
			return
		}
	}
}

// heal does what a device does first.
func (c *check) heal(rule, when string) {
	if h, ok := c.b.(ota.Healer); ok {
		if _, err := h.Heal(c.ctx); err != nil {
			c.fail(rule, "healing %s: %w", when, err)
		}
	}
}

func (c *check) atomic() {
	all := c.states()
	older, newer := all[1], all[3]
	for _, k := range []Fault{Cut, Fail} {
		c.faults(k, "atomic", &older, func() error { return c.b.Store(c.ctx, newer.Clone()) }, func(when string, err error) bool {
			want := []ota.BootState{older, newer}
			if err == nil {
				want = want[1:]
			}
			got, ok := c.expect("atomic", when, want...)
			if !ok {
				return false
			}
			c.heal("atomic", when)
			if _, ok = c.expect("atomic", "once more "+when, got); !ok {
				return false
			}
			if !c.store("atomic", all[4]) {
				return false
			}
			_, ok = c.expect("atomic", "what was stored "+when, all[4])
			return ok
		})
	}
}

func (c *check) dropped() {
	all := c.states()
	c.faults(Drop, "dropped", &all[0], func() error { return c.b.Store(c.ctx, all[1].Clone()) }, func(when string, err error) bool {
		want := all[:2]
		if err == nil {
			want = all[1:2]
		}
		_, ok := c.expect("dropped", when, want...)
		return ok
	})
}

func (c *check) readErrors() {
	all := c.states()
	if !c.restart() {
		return
	}
	c.store("store", all[2])
	c.store("store", all[1])
	var got ota.BootState
	load := func() (err error) {
		got, err = c.b.Load(c.ctx)
		return err
	}
	c.faults(FailRead, "read-error", nil, load, func(when string, err error) bool {
		switch {
		case errors.Is(err, ota.ErrNoBootState):
			c.fail("read-error", "%s: %w", when, err)
		case err == nil && !got.Equal(all[1]):
			c.fail("read-error", "%s: loaded %s, not %s", when, brief(got), brief(all[1]))
		}
		c.expect("read-error", "again "+when, all[1])
		return !c.broken["read-error"]
	})
}
