// Package linear_test calls devices from several goroutines at once and checks
// that the answers, and the states seen, are those of some order of the calls
// that agrees with the time they were made at.
package linear_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/slotota/ota/interop/statemachine"
)

var (
	histories = flag.Int("linear.histories", 600, "how many histories to record and check")
	firstSeed = flag.Uint64("linear.seed", 0, "seed of the first history; 0 means a random one")
)

// kind is a kind of operation.
type kind uint8

const (
	read kind = iota // BootState, or the state in Status
	commit
	revert
	update
	snapshot
	setBootState
	watch
	finish // the second half of an update or snapshot
)

func (k kind) String() string {
	return [...]string{"read", "commit", "revert", "update", "snapshot", "setbootstate", "watch", "finish"}[k]
}

// long reports whether nobody waits for the operation.
func (k kind) long() bool { return k == update || k == snapshot || k == setBootState }

// input is an operation.
type input struct {
	kind    kind
	client  int
	image   statemachine.Image
	same    bool // ignore the same version
	trial   ota.TrialID
	set     bool // as revert
	patch   ota.BootStatePatch
	timeout time.Duration

	called, returned time.Duration // on the boot clock
}

// output is its answer.
type output struct {
	err   error
	state statemachine.State // read
	trial ota.TrialID        // of read and update
	reset bool               // watch has reset the device
	same  bool               // update has found the image in place
}

// model is the state of the sequential model: that of the device, and which
// client is between the two halves of an update or snapshot.
type model struct {
	statemachine.State
	id    ota.TrialID // of the trial
	known bool        // whether somebody has seen id yet
	owner int         // 0 if nobody is
	next  statemachine.State
	first int // number of the trial that Watch is about
}

func step(m model, in input, out output) (bool, model) {
	e := statemachine.Env{
		Slots: 3, Tries: 1, Next: m.Trial + 1, Up: in.called,
		Holds: func(ota.SlotID, int) bool { return true },
	}
	if errors.Is(out.err, ota.ErrExpired) || in.kind == watch {
		e.Up = in.returned
	}
	switch {
	case in.kind == read:
		want := m.State
		want.Trial = 0
		if m.known && m.id != out.trial {
			return false, m
		}
		m.id, m.known = out.trial, true
		return out.state == want, m
	case errors.Is(out.err, ota.ErrBusy):
		// See busy. During a trial what is long is refused soon, so that the
		// others wait for it.
		return in.kind != watch && (in.kind.long() || m.Committed), m
	case in.kind == finish:
		if m.owner != in.client {
			return false, m
		}
		m.enter(m.next)
		if out.trial != (ota.TrialID{}) {
			m.id, m.known = out.trial, true
		}
		m.owner = 0
		return true, m
	case m.owner != 0:
		return false, m
	}
	var st statemachine.Step
	switch in.kind {
	case commit:
		id := 0
		switch {
		case in.trial == ota.TrialID{}:
		case m.known && in.trial == m.id:
			id = m.Trial
		default:
			id = statemachine.Unknown
		}
		st = m.Do(e, statemachine.Op{Kind: statemachine.Commit, Trial: id})
	case revert:
		st = m.Do(e, statemachine.Op{Kind: statemachine.Revert, Reason: ota.ReasonRequested})
	case setBootState:
		st = m.Do(e, statemachine.Op{Kind: statemachine.SetBootState, Patch: in.patch})
	case update, snapshot:
		op := statemachine.Op{Kind: statemachine.Snapshot, SetAsRevert: in.set, Timeout: in.timeout}
		if in.kind == update {
			op.Kind, op.Content, op.IgnoreSame = statemachine.Update, in.image.Content(), in.same
		}
		st = m.Do(e, op)
		if st.Err == nil && len(st.Steps) > 0 {
			m.next, m.owner = st.End(m.State), in.client
			st.Steps = st.Steps[:len(st.Steps)-1]
		}
	case watch:
		switch {
		case out.reset:
			if !m.Expired(e) {
				return false, m
			}
			st = m.Do(e, statemachine.Op{Kind: statemachine.Revert, Reason: ota.ReasonTimeout})
			if st.Err == nil {
				st.Err = ota.ErrReverted
			}
		case out.err != nil:
			return m.Trial == m.first && m.Outcome == ota.OutcomeReverted && errors.Is(out.err, ota.ErrReverted), m
		case m.OnTrial() && m.Timeout == 0:
			st = m.Do(e, statemachine.Op{Kind: statemachine.Commit, Trial: m.Trial})
		default:
			return m.Trial != m.first || m.Outcome != ota.OutcomeReverted && m.Committed, m
		}
	}
	if !st.Answers(out.err) {
		return false, m
	}
	m.enter(st.End(m.State))
	return true, m
}

// enter makes s the state.
func (m *model) enter(s statemachine.State) {
	if s.Trial != m.Trial {
		m.known = false
	}
	m.State = s
}

// device is what a history is about.
type device struct {
	dev    *ota.Device
	resets atomic.Int64
	booted time.Time

	mu  sync.Mutex // of what follows
	rng *rand.Rand
	ops []porcupine.Operation

	clock atomic.Int64 // numbers calls and returns
}

// pause takes a moment, so that operations overlap in virtual time.
func (d *device) pause() {
	d.mu.Lock()
	n := d.rng.IntN(4)
	d.mu.Unlock()
	if n > 0 {
		<-time.After(time.Duration(n) * time.Millisecond)
	} else {
		runtime.Gosched()
	}
}

// do performs an operation and records it.
func (d *device) do(in input, op func() output) output {
	in.called = time.Since(d.booted)
	call := d.clock.Add(1)
	out := op()
	ret := d.clock.Add(1)
	in.returned = time.Since(d.booted)
	d.mu.Lock()
	defer d.mu.Unlock()
	add := func(in input) {
		d.ops = append(d.ops, porcupine.Operation{ClientId: in.client, Input: in, Output: out, Call: call, Return: ret})
	}
	add(in)
	if out.err == nil && (in.kind == update || in.kind == snapshot) && !out.same {
		in.kind = finish
		add(in)
	}
	return out
}

// read reads the state, in one of two ways.
func (d *device) read(t *testing.T, client int, status bool) output {
	return d.do(input{kind: read, client: client}, func() output {
		s, err := d.dev.BootState(context.Background())
		if status {
			st := d.dev.Status()
			s = st.State
		}
		v, verr := statemachine.View(s, d.dev.Running())
		if err = errors.Join(err, verr); err != nil {
			t.Errorf("bootstate: %v", err)
		}
		return output{state: v, trial: s.Trial}
	})
}

const deadline = time.Second // the commit timeout

// client makes some calls.
func (d *device) client(t *testing.T, client int, late bool, rng *rand.Rand) {
	var seen ota.TrialID
	ctx := context.Background()
	for range 5 {
		switch up := time.Since(d.booted); {
		case up < deadline && (late || rng.IntN(6) == 0):
			// Meet the timer.
			<-time.After(deadline - up - 3*time.Millisecond + time.Duration(rng.IntN(5))*time.Millisecond)
		case rng.IntN(2) == 0:
			<-time.After(time.Duration(rng.IntN(20)) * time.Millisecond)
		}
		in := input{client: client, timeout: time.Duration(rng.IntN(2)) * deadline}
		switch k := rng.IntN(16); {
		case k < 4:
			seen = d.read(t, client, k%2 == 0).trial
		case k < 8:
			in.kind = commit
			switch rng.IntN(4) {
			case 0:
				in.trial = seen
			case 1:
				in.trial = ota.TrialID{1}
			}
			d.do(in, func() output {
				if in.trial != (ota.TrialID{}) {
					return output{err: d.dev.CommitTrial(ctx, in.trial)}
				}
				return output{err: d.dev.Commit(ctx)}
			})
		case k < 10:
			in.kind = revert
			d.do(in, func() output { return output{err: d.dev.Revert(ctx)} })
		case k < 13:
			in.kind, in.same = update, rng.IntN(4) == 0
			in.image = statemachine.Image{Version: 2 + rng.IntN(3), Security: uint64(rng.IntN(3))}
			switch rng.IntN(5) {
			case 0:
				in.image.Fault = statemachine.WrongDigest
			case 1:
				in.image.Fault = statemachine.Unsigned
			}
			d.do(in, func() output {
				res, err := d.dev.Update(ctx, in.image.Open(), &ota.UpdateOptions{CommitTimeout: in.timeout, IgnoreSameVersion: in.same})
				return output{err: err, trial: res.Trial, same: res.Same}
			})
		case k < 14:
			in.kind, in.set = snapshot, rng.IntN(2) == 0
			d.do(in, func() output {
				_, err := d.dev.CreateSnapshot(ctx, &ota.SnapshotOptions{SetAsRevert: in.set, CommitTimeout: in.timeout})
				return output{err: err}
			})
		default:
			in.kind = setBootState
			slot := func() *ota.SlotID {
				if rng.IntN(2) == 0 {
					return nil
				}
				id := ota.SlotID(rng.IntN(4) - 1)
				return &id
			}
			in.patch.Active, in.patch.Revert = slot(), slot()
			if rng.IntN(2) == 0 {
				no := false
				in.patch.Committed = &no
			}
			d.do(in, func() output { return output{err: d.dev.SetBootState(ctx, in.patch)} })
		}
	}
}

// watch is the timer.
func (d *device) watch() {
	d.do(input{kind: watch, client: 5}, func() output {
		before := d.resets.Load()
		err := d.dev.Watch(context.Background())
		return output{err: err, reset: d.resets.Load() > before}
	})
}

// prepare returns devices to start from: one that boots version 2 on trial next,
// with each kind of commit timeout, and one on which version 2 is committed.
func prepare(t *testing.T) []*sim.Device {
	g := sim.Geometries()[0]
	g.Slots = 3
	o := &ota.Options{
		Platform: "sim", Product: "demo", BufferSize: 1 << 10,
		BootClock: func() (time.Duration, error) { return 0, nil },
	}
	image := statemachine.Image{Version: 2, Security: 1}
	var ds []*sim.Device
	for _, timeout := range []time.Duration{deadline, 0, deadline} {
		d, err := sim.New(g)
		require.NoError(t, err)
		dev, _, err := d.Boot(t.Context(), o)
		require.NoError(t, err)
		_, err = dev.Update(t.Context(), image.Open(), &ota.UpdateOptions{CommitTimeout: timeout})
		require.NoError(t, err)
		ds = append(ds, d)
	}
	dev, _, err := ds[2].Boot(t.Context(), o)
	require.NoError(t, err)
	require.NoError(t, dev.Commit(t.Context()))
	return ds
}

// record lets four clients and the timer loose on a copy of base and returns what
// they saw.
func record(t *testing.T, base *sim.Device, seed uint64) (ops []porcupine.Operation, start model) {
	synctest.Test(t, func(t *testing.T) {
		sd, err := base.Clone()
		require.NoError(t, err)
		d := &device{booted: time.Now(), rng: rand.New(rand.NewPCG(seed, 0))}
		sd.Chip.OnOp(func(op memflash.Op) {
			if op.Kind != memflash.OpRead {
				d.pause()
			}
		})
		var h ota.Handover
		d.dev, h, err = sd.Boot(t.Context(), &ota.Options{
			Platform: "sim", Product: "demo", BufferSize: 1 << 10,
			BootClock: func() (time.Duration, error) { return time.Since(d.booted), nil },
			Reset:     func(context.Context) error { d.resets.Add(1); return nil },
			OnEvent:   func(ota.Event) { d.pause() },
		})
		require.NoError(t, err)
		start.State, err = statemachine.View(h.State, h.Slot)
		require.NoError(t, err)
		start.Trial, start.first, start.id, start.known = 1, 1, h.State.Trial, true
		var wg sync.WaitGroup
		wg.Go(d.watch)
		for c := 1; c <= 4; c++ {
			wg.Go(func() { d.client(t, c, seed%2 == 0, rand.New(rand.NewPCG(seed, uint64(c)))) })
		}
		wg.Wait()
		last := d.read(t, 1, false)
		ops = d.ops

		stored, err := sd.Record.Load(t.Context())
		require.NoError(t, err)
		v, err := statemachine.View(stored, h.Slot)
		require.NoError(t, err)
		require.Equal(t, v, last.state, "what is stored, and what the device says")
		require.NoError(t, sd.Chip.Err())
	})
	return ops, start
}

// busy returns the operations that were refused with ErrBusy although no other
// one that can have been the cause was under way.
func busy(ops []porcupine.Operation) (bad []porcupine.Operation) {
	for i, a := range ops {
		in, out := a.Input.(input), a.Output.(output)
		if !errors.Is(out.err, ota.ErrBusy) {
			continue
		}
		ok := false
		for j, b := range ops {
			o := b.Input.(input)
			ok = ok || i != j && o.kind != read && (in.kind.long() || o.kind.long()) && a.Call < b.Return && b.Call < a.Return &&
				!errors.Is(b.Output.(output).err, ota.ErrBusy)
		}
		if !ok {
			bad = append(bad, a)
		}
	}
	return bad
}

func describe(ops []porcupine.Operation) string {
	var b strings.Builder
	for _, o := range ops {
		in, out := o.Input.(input), o.Output.(output)
		fmt.Fprintf(&b, "[%d,%d] client %d: %v", o.Call, o.Return, o.ClientId, in.kind)
		switch in.kind {
		case read:
			fmt.Fprintf(&b, " -> %v %+v", out.trial, out.state)
		default:
			fmt.Fprintf(&b, " (%v to %v) %+v trial %v patch %v -> %v %v %t", in.called, in.returned, in.image, in.trial, patch(in.patch), out.err, out.trial, out.reset)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func patch(p ota.BootStatePatch) (s string) {
	if p.Active != nil {
		s += fmt.Sprint(" active ", *p.Active)
	}
	if p.Committed != nil {
		s += fmt.Sprint(" committed ", *p.Committed)
	}
	if p.Revert != nil {
		s += fmt.Sprint(" revert ", *p.Revert)
	}
	return s
}

// past are the seeds of histories that failed once. How goroutines interleave at
// the same instant is up to the scheduler, so that each is run again and again
// over time.
var past = []uint64{6, 12, 48, 251, 943}

// Whatever four clients and the timer do at the same time, it is as if they had
// done it one after the other. A call is refused with ErrBusy only while another
// one is under way.
func TestLinearizable(t *testing.T) {
	bases := prepare(t)
	seed := *firstSeed
	if seed == 0 {
		seed = rand.Uint64N(1 << 40)
	}
	seeds := slices.Clone(past)
	for i := range *histories {
		seeds = append(seeds, seed+uint64(i))
	}
	total, refused, watched := 0, 0, 0
	for _, seed := range seeds {
		ops, start := record(t, bases[seed%uint64(len(bases))], seed)
		m := porcupine.Model{
			Init: func() any { return start },
			Step: func(s, in, out any) (bool, any) { return step(s.(model), in.(input), out.(output)) },
		}
		res := porcupine.CheckOperationsTimeout(m, ops, 30*time.Second)
		require.Equalf(t, porcupine.Ok, res, "-linear.seed=%d\nstart %+v\n%s", seed, start, describe(ops))
		require.Emptyf(t, describe(busy(ops)), "-linear.seed=%d: busy without a cause\n%s", seed, describe(ops))
		for _, o := range ops {
			if errors.Is(o.Output.(output).err, ota.ErrBusy) {
				refused++
			}
			if o.Output.(output).reset {
				watched++
			}
		}
		total += len(ops)
	}
	require.Positive(t, refused, "nothing overlapped")
	t.Logf("%d histories from seed %d, %d operations, %d refused as busy, %d timeouts", len(seeds), seed, total, refused, watched)
}
