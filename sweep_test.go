package ota_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

var (
	crashLong   = flag.Bool("crash.long", false, "sweep all geometries, scenarios, pairs and triples")
	crashSeeds  = flag.Int("crash.seeds", 1, "variants of each power cut; with -crash.long 24")
	crashReplay = flag.String("crash.replay", "", "repeat the run that a sweep has named")
)

// world is a simulated device with what was promised about it so far.
type world struct {
	d   *sim.Device
	dev *ota.Device
	o   ota.Options

	again  bool   // what was interrupted is tried again in the end
	chunks bool   // images come in chunks that can be selected
	trials uint64 // started so far

	promised int // image that a committed boot must start
	maybe    int // image that it may start instead, while an answer is missing
	trial    int // image that may run uncommitted
	boots    int // how often it did
	dead     bool
	floor    uint64
	wrote    error // a write where none is allowed
}

func newWorld(g sim.Geometry) (*world, error) {
	d, err := sim.New(g)
	if err != nil {
		return nil, err
	}
	w := &world{d: d, promised: 1}
	return w, w.boot()
}

// clone returns a copy of w on a chip of its own, to be booted.
func (w *world) clone() (*world, error) {
	c := *w
	var err error
	if c.d, err = w.d.Clone(); err != nil {
		return nil, err
	}
	return &c, nil
}

// guard notes writes to the running slot and, during a trial, to any slot.
func (w *world) guard() {
	w.d.Chip.OnOp(func(op memflash.Op) {
		slot := ota.SlotID(op.Flash / 2)
		if op.Kind == memflash.OpRead || int(slot) >= len(w.d.Slots) || w.wrote != nil {
			return
		}
		switch {
		case w.dev == nil:
			w.wrote = fmt.Errorf("%v in slot %d during boot", op.Kind, slot)
		case slot == w.dev.Running():
			w.wrote = fmt.Errorf("%v in running slot %d", op.Kind, slot)
		default:
			if s, err := w.dev.BootState(context.Background()); err != nil || !s.Committed {
				w.wrote = fmt.Errorf("%v in slot %d during a trial (%v)", op.Kind, slot, err)
			} else if s.Active == slot || s.Revert == slot {
				w.wrote = fmt.Errorf("%v in slot %d, which the boot state points to", op.Kind, slot)
			} else if len(s.Slot(slot).Parts) > 0 {
				w.wrote = fmt.Errorf("%v in slot %d, which the boot state calls verified", op.Kind, slot)
			}
		}
	})
}

// boot restarts the device.
func (w *world) boot() error {
	w.dev = nil
	w.guard()
	if err := w.d.Restart(); err != nil {
		return err
	}
	ctx := context.Background()
	b := &counted{Record: w.d.Record, n: &w.trials, ids: map[ota.TrialID]ota.TrialID{}}
	h, err := ota.Boot(ctx, b, w.d.Slots, &ota.BootOptions{BufferSize: 1 << 10})
	if err != nil {
		return err
	}
	if err := w.started(h); err != nil {
		return err
	}
	w.d.Running = h.Slot
	o := w.o
	o.Platform, o.Product, o.BufferSize = "sim", "demo", 1<<10
	w.dev, err = ota.Open(ctx, b, w.d.Slots, &o)
	return err
}

// started checks what the boot stage has handed over to.
func (w *world) started(h ota.Handover) error {
	v := w.d.Identify(h.Slot)
	s := h.State
	switch {
	case v == 0:
		return violation("I1: slot %d is started and is not complete", h.Slot)
	case sim.Security(v) < s.Floor:
		return violation("I7: image %d is started below the floor %d", v, s.Floor)
	case s.Floor < w.floor:
		return violation("I7: the floor fell from %d to %d", w.floor, s.Floor)
	case s.Committed && v != w.promised && v != w.maybe:
		return violation("I4: image %d is started, %d was promised", v, w.promised)
	case s.Committed && v > 1 && s.Floor < sim.Security(v):
		return violation("I7: image %d is committed, the floor is %d", v, s.Floor)
	case s.Committed:
		w.promised, w.maybe, w.trial = v, 0, 0
	case h.Slot == s.Revert:
		// The boot could not be counted, so it does not go to the trial.
		if v != w.promised {
			return violation("I4: image %d is started instead of the trial, %d was promised", v, w.promised)
		}
	case v != w.trial:
		return violation("I10: image %d is started on trial, not %d", v, w.trial)
	case w.dead:
		return violation("I6: image %d is back after it was reverted", v)
	case w.boots > 0:
		return violation("I3: image %d boots once more without a commit", v)
	default:
		w.boots++
	}
	w.floor = s.Floor
	return nil
}

// counted is a boot record in which trials are numbered, not drawn at random, so
// that equal runs write equal bytes.
type counted struct {
	*bootrecord.Record
	n   *uint64
	mu  sync.Mutex
	ids map[ota.TrialID]ota.TrialID // as stored, and back
}

func (c *counted) Store(ctx context.Context, s ota.BootState) error {
	c.mu.Lock()
	if _, ok := c.ids[s.Trial]; !ok && s.Trial != (ota.TrialID{}) {
		*c.n++
		var id ota.TrialID
		binary.LittleEndian.PutUint64(id[:], *c.n)
		c.ids[s.Trial], c.ids[id] = id, s.Trial
	}
	c.mu.Unlock()
	return c.Record.Store(ctx, c.translate(s))
}

func (c *counted) Load(ctx context.Context) (ota.BootState, error) {
	s, err := c.Record.Load(ctx)
	return c.translate(s), err
}

func (c *counted) Heal(ctx context.Context) (ota.BootState, error) {
	s, err := c.Record.Heal(ctx)
	return c.translate(s), err
}

// translate replaces the ids in s that were drawn since the last boot by the
// numbers stored for them, and the other way round.
func (c *counted) translate(s ota.BootState) ota.BootState {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range []*ota.TrialID{&s.Trial, &s.Last.Trial} {
		if _, ok := c.ids[*id]; !ok {
			c.ids[*id] = *id
		}
		*id = c.ids[*id]
	}
	return s
}

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %w", crashtest.ErrViolation, fmt.Errorf(format, args...))
}

func (w *world) startTrial(v int) { w.trial, w.boots, w.dead = v, 0, false }

func (w *world) update(v int, timeout time.Duration) error {
	w.startTrial(v)
	before, berr := w.dev.BootState(context.Background())
	var img ota.Image = &sim.Image{V: v}
	if w.chunks {
		img = inChunks(v)
	}
	res, err := w.dev.Update(context.Background(), img, &ota.UpdateOptions{CommitTimeout: timeout})
	if err == nil {
		if w.d.Identify(res.Slot) != v {
			return violation("I13: after the update slot %d is not complete", res.Slot)
		}
		return nil
	}
	after, aerr := w.dev.BootState(context.Background())
	if berr == nil && aerr == nil && (after.Active != before.Active || after.Committed != before.Committed) {
		return violation("I12: the update failed (%w) and changed %+v to %+v", err, before, after)
	}
	return err
}

// inChunks returns image v in chunks that can be selected.
func inChunks(v int) ota.Image {
	const size = 300
	return &sim.Image{V: v, Mutate: func(info *ota.ImageInfo) {
		for i := range info.Parts {
			p := &info.Parts[i]
			p.Chunks = &ota.Chunks{Size: size}
			for b := range slices.Chunk(sim.Content(v, p.Name), size) {
				p.Chunks.SHA256 = append(p.Chunks.SHA256, sha256.Sum256(b))
			}
		}
	}, Wrap: func(part string, _ io.Reader) io.Reader {
		return &selection{content: sim.Content(v, part)}
	}}
}

// selection is data that can be selected from.
type selection struct {
	content []byte
	io.Reader
}

func (s *selection) Select(wanted []ota.Range) error {
	var rs []io.Reader
	for _, r := range wanted {
		rs = append(rs, bytes.NewReader(s.content[r.Off:r.Off+r.Len]))
	}
	s.Reader = io.MultiReader(rs...)
	return nil
}

func (w *world) commit() error {
	w.maybe = w.trial
	if err := w.dev.Commit(context.Background()); err != nil {
		return err
	}
	w.promised, w.maybe, w.trial = w.trial, 0, 0
	return nil
}

func (w *world) revert() error {
	if err := w.dev.Revert(context.Background()); err != nil {
		return err
	}
	w.dead = true
	return nil
}

// expire lets the commit timeout run out under Watch.
func (w *world) expire() error {
	err := w.dev.Watch(context.Background())
	switch {
	case errors.Is(err, memflash.ErrPowerOff), errors.Is(err, memflash.ErrFault):
		return err
	case !errors.Is(err, ota.ErrReverted):
		return fmt.Errorf("watch returned %w", err)
	}
	w.dead = true
	return nil
}

func (w *world) snapshot(setAsRevert bool) error {
	if setAsRevert {
		w.startTrial(w.promised)
	}
	id, err := w.dev.CreateSnapshot(context.Background(), &ota.SnapshotOptions{SetAsRevert: setAsRevert})
	if err == nil && w.d.Identify(id) != w.promised {
		return violation("I11: the snapshot in slot %d is not complete", id)
	}
	return err
}

func (w *world) setActive(v int) error {
	w.startTrial(v)
	other := 1 - w.dev.Running()
	return w.dev.SetBootState(context.Background(), ota.BootStatePatch{Active: &other})
}

// settle reboots until the device runs a committed image, which must take two
// boots at most, and if update is set makes sure that it can still be updated.
func (w *world) settle(update bool) error {
	for n := 1; ; n++ {
		if err := w.boot(); err != nil {
			return err
		}
		s, err := w.dev.BootState(context.Background())
		if err != nil {
			return err
		}
		if s.Committed && s.Active == w.dev.Running() {
			break
		}
		if n == 2 {
			return fmt.Errorf("I16: not committed after two boots: %+v", s)
		}
	}
	if !update {
		return w.misuse()
	}
	v := 7
	if w.again && w.promised != 3 {
		v = 3
	}
	if err := w.update(v, 0); err != nil {
		return fmt.Errorf("I16: no update afterwards: %w", err)
	}
	if err := w.boot(); err != nil {
		return err
	}
	if err := w.commit(); err != nil {
		return fmt.Errorf("I16: no commit afterwards: %w", err)
	}
	if err := w.boot(); err != nil {
		return err
	}
	if w.promised != v || w.floor != sim.Security(v) {
		return violation("I4: image %d is committed, floor %d", w.promised, w.floor)
	}
	return w.misuse()
}

// misuse reports writes where none are allowed.
func (w *world) misuse() error {
	if w.wrote != nil {
		return violation("I2: %w", w.wrote)
	}
	return nil
}

// scenario is something done to a device, to be interrupted anywhere.
type scenario struct {
	name string
	o    ota.Options
	prep func(*world) error
	run  func(*world) error

	update bool // every run ends with an update
	record bool // none does
	again  bool // which is the one that was interrupted
	chunks bool // images come in chunks that can be selected
}

// steps runs functions one after the other until one fails.
func steps(fs ...func() error) error {
	for _, f := range fs {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// runsV2 leaves version 2 running and committed, with version 1 beside it.
func runsV2(w *world) error {
	return steps(func() error { return w.update(2, 0) }, w.boot, w.commit, w.boot)
}

// besideV3 leaves version 3 beside it, reverted.
func besideV3(w *world) error {
	return steps(func() error { return runsV2(w) }, func() error { return w.update(3, 0) }, w.boot, w.revert, w.boot)
}

// halfV3 leaves the first half of version 3 beside it.
func halfV3(w *world) error {
	if err := runsV2(w); err != nil {
		return err
	}
	ops := w.d.Chip.Ops()
	whole, err := w.clone()
	if err != nil {
		return err
	}
	if err := steps(whole.boot, func() error { return whole.update(3, 0) }); err != nil {
		return err
	}
	w.d.Chip.Plan(memflash.Fault{Kind: memflash.CutPrefix, At: ops + whole.d.Chip.Ops()/2, Seed: 1})
	if err := w.update(3, 0); !errors.Is(err, memflash.ErrPowerOff) {
		return fmt.Errorf("not cut: %w", err)
	}
	return w.boot()
}

func scenarios() []scenario {
	late := ota.Options{BootClock: func() (time.Duration, error) { return time.Hour, nil },
		Reset: func(context.Context) error { return nil }}
	update := func(w *world) func() error { return func() error { return w.update(3, 0) } }
	return []scenario{
		{name: "first update", run: func(w *world) error { return w.update(3, 0) }},
		{name: "update", prep: runsV2, run: func(w *world) error { return w.update(3, 0) }},
		{name: "update+commit", prep: runsV2, run: func(w *world) error { return steps(update(w), w.boot, w.commit) }},
		{name: "update+revert", prep: runsV2, run: func(w *world) error { return steps(update(w), w.boot, w.revert, w.boot) }},
		{name: "update+timeout", prep: runsV2, o: late, run: func(w *world) error {
			return steps(func() error { return w.update(3, time.Minute) }, w.boot, w.expire, w.boot)
		}},
		{name: "update again", prep: besideV3, run: func(w *world) error { return steps(update(w), w.boot, w.commit) }},
		{name: "resume", prep: halfV3, run: func(w *world) error { return steps(update(w), w.boot, w.commit) }},
		{name: "resume twice", prep: halfV3, again: true, update: true, run: func(w *world) error { return w.update(3, 0) }},
		{name: "resume chunks", prep: halfV3, chunks: true, again: true, update: true, run: func(w *world) error { return w.update(3, 0) }},
		{name: "snapshot", prep: runsV2, run: func(w *world) error { return w.snapshot(false) }},
		{name: "set_as_revert", prep: runsV2, run: func(w *world) error {
			return steps(func() error { return w.snapshot(true) }, w.boot, w.commit)
		}},
		{name: "setbootstate", prep: besideV3, run: func(w *world) error {
			return steps(func() error { return w.setActive(3) }, w.boot, w.commit)
		}},
	}
}

// recordScenarios write the boot state only, but for an update before them.
func recordScenarios() []scenario {
	trial := func(w *world) error {
		return steps(func() error { return runsV2(w) }, func() error { return w.update(3, 0) })
	}
	return []scenario{
		{name: "boot", prep: trial, record: true, run: func(w *world) error { return nil }},
		{name: "commit", prep: trial, record: true, run: (*world).commit},
		{name: "revert", prep: trial, record: true, run: func(w *world) error { return steps(w.revert, w.boot) }},
		{name: "select", prep: besideV3, record: true, run: func(w *world) error { return w.setActive(3) }},
	}
}

// crashScenario has sc interrupted on a device of geometry g.
func crashScenario(g sim.Geometry, sc scenario) crashtest.Scenario {
	base := sync.OnceValues(func() (*world, error) {
		w, err := newWorld(g)
		if err != nil {
			return nil, err
		}
		w.o, w.again, w.chunks = sc.o, sc.again, sc.chunks
		if sc.prep != nil {
			err = sc.prep(w)
		}
		return w, err
	})
	return crashtest.Scenario{Name: g.Name + "/" + sc.name, New: func(context.Context) (*crashtest.Device, error) {
		b, err := base()
		if err != nil {
			return nil, err
		}
		w, err := b.clone()
		if err != nil {
			return nil, err
		}
		return &crashtest.Device{
			Chip: w.d.Chip,
			Run:  func(context.Context) error { return steps(w.boot, func() error { return sc.run(w) }) },
			Check: func(context.Context) error {
				// An update after each run would take most of the time.
				all := sc.update || *crashLong || *crashReplay != ""
				return w.settle(!sc.record && (all || w.d.Chip.Ops()%3 == 0))
			},
		}, nil
	}}
}

// crash explores scenarios on geometries, and counts what it tried by the name of
// what strikes.
func crash(t *testing.T, what string, gs []sim.Geometry, scs []scenario, seeds int, faults ...crashtest.Modes) {
	t.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(800)) // many small short-lived devices
	var all []crashtest.Scenario
	for _, g := range gs {
		for _, sc := range scs {
			all = append(all, crashScenario(g, sc))
		}
	}
	r := crashtest.Run(t, all, &crashtest.Options{Faults: faults, Seeds: seeds, Replay: *crashReplay})
	if len(r.Runs) > 0 {
		t.Logf("%s: %d on %d geometries", what, r.Runs[len(r.Runs)-1], len(gs))
	}
}

// first returns the first n of s, as many as there is time for; one in short
// runs, all in long ones.
func first[T any](s []T, n int) []T {
	switch {
	case *crashLong || *crashReplay != "":
		return s
	case testing.Short():
		return s[:1]
	}
	return s[:n]
}

// A power cut at every operation, in every way, leaves a device that boots what
// was promised and can be updated.
func TestPowerCutSweep(t *testing.T) {
	seeds := *crashSeeds
	if *crashLong && seeds == 1 {
		seeds = 24
	}
	// What a cache loses makes a difference only where there is one.
	cuts := func(seed uint64) []memflash.Fault {
		return slices.DeleteFunc(memflash.TearModes(seed), func(f memflash.Fault) bool { return f.Loss != memflash.LoseNone })
	}
	var cached, direct []sim.Geometry
	for _, g := range sim.Geometries() {
		if g.Record.Unsynced {
			cached = append(cached, g)
		} else {
			direct = append(direct, g)
		}
	}
	cached, direct = first(cached, len(cached)), first(direct, len(direct))
	t.Run("direct", func(t *testing.T) { crash(t, "single power cuts", direct, scenarios(), seeds, cuts) })
	t.Run("cached", func(t *testing.T) { crash(t, "single power cuts", cached, scenarios(), seeds, memflash.TearModes) })
}

// So does an operation that fails, once or from then on, or that does nothing
// and says nothing.
func TestFaultSweep(t *testing.T) {
	crash(t, "I/O errors of writes, erasures and syncs", first(sim.Geometries(), 3), scenarios(), 1, func(seed uint64) []memflash.Fault {
		return []memflash.Fault{
			{Kind: memflash.Fail, Seed: seed},
			{Kind: memflash.Fail, Seed: seed, Forever: true},
			{Kind: memflash.Fail, N: 5, Seed: seed, Loss: memflash.LoseSome},
			{Kind: memflash.Skip, Seed: seed},
		}
	})
}

// So does a read that fails, once or from then on.
func TestReadFaultSweep(t *testing.T) {
	crash(t, "I/O errors of reads", first(sim.Geometries(), 1), scenarios(), 1, func(seed uint64) []memflash.Fault {
		return []memflash.Fault{
			{Kind: memflash.Fail, On: memflash.OpRead, Seed: seed},
			{Kind: memflash.Fail, On: memflash.OpRead, Seed: seed, Forever: true},
		}
	})
}

// tears are the ways to cut an operation that differ most.
func tears(seed uint64) []memflash.Fault {
	return first([]memflash.Fault{
		{Kind: memflash.CutBits, Seed: seed},
		{Kind: memflash.CutPrefix, Seed: seed},
		{Kind: memflash.CutAfter, Seed: seed},
	}, 1)
}

// losses are tears that a cache makes worse.
func losses(seed uint64) []memflash.Fault {
	return []memflash.Fault{
		{Kind: memflash.CutBits, Seed: seed, Loss: memflash.LoseSome},
		{Kind: memflash.CutAfter, Seed: seed, Loss: memflash.LoseAll},
	}
}

// A second power cut, at any place after the first, changes nothing.
func TestPairSweep(t *testing.T) {
	scs := scenarios()
	for i := range scs {
		scs[i].update = true
	}
	gs := sim.Geometries()
	const what = "pairs of power cuts"
	// Pages that are erased to 0x00, units of several sizes; and a cache.
	t.Run("direct", func(t *testing.T) {
		crash(t, what, first([]sim.Geometry{gs[0], gs[2]}, 1), first(scs, 2), 1, tears, tears)
	})
	t.Run("cached", func(t *testing.T) {
		crash(t, what, first([]sim.Geometry{gs[4], gs[1]}, 1), first(scs, 1), 1, losses, losses)
	})
}

// Nor does a third one where only the boot state is written.
func TestTripleSweep(t *testing.T) {
	crash(t, "triples of power cuts", sim.Geometries()[:1], first(recordScenarios(), 1), 1, tears, tears, tears)
}

// A run can be repeated: equal faults leave equal bytes.
func TestSweepIsExact(t *testing.T) {
	g := sim.Geometries()[4]
	sc := scenarios()[2]
	sc.update = true
	s := crashScenario(g, sc)
	fresh := s.New
	var chips []*memflash.Chip
	s.New = func(ctx context.Context) (*crashtest.Device, error) {
		d, err := fresh(ctx)
		if err == nil {
			chips = append(chips, d.Chip)
		}
		return d, err
	}
	for at := 1; at < 40; at += 3 {
		chips = nil
		for range 2 {
			for _, f := range memflash.TearModes(7) {
				f.At = at
				require.NoError(t, s.Replay(t.Context(), f))
			}
		}
		half := len(chips) / 2
		for i := range half {
			require.True(t, chips[i].Equal(chips[half+i]), "op %d, mode %d", at, i)
		}
	}
}
