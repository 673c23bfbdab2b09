// Package model_test replays walks through the Promela model in the real code.
package model_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
)

const (
	slotSize = 512
	timeout  = time.Minute
)

// images are the contents that the model tells apart; 0 is anything else.
var images = func() (im [4][]byte) {
	for v := 1; v < len(im); v++ {
		im[v] = make([]byte, slotSize)
		rng := rand.NewPCG(uint64(v), 0)
		for i := range im[v] {
			im[v][i] = byte(rng.Uint64())
		}
		im[v][0] = byte(v) // an erased byte would hide a torn write
	}
	return im
}()

// security is the security version of image v.
func security(v int) uint64 {
	if v == 2 {
		return 1
	}
	return 0
}

// device is a simulated device and whatever runs on it.
type device struct {
	chip    *memflash.Chip
	places  []ota.Flash
	slots   []ota.Slot
	tries   int
	running ota.SlotID
	dev     *ota.Device // nil unless the updater is up
	expired bool
	trials  []ota.TrialID // those begun, as Commit messages name them
}

func newDevice(t *testing.T, copies, tries int, stored bool) *device {
	var cfg []memflash.Config
	for range copies {
		cfg = append(cfg, memflash.Config{Size: bootrecord.MaxSize, EraseSize: bootrecord.MaxSize})
	}
	for range 2 {
		cfg = append(cfg, memflash.Config{Size: slotSize, EraseSize: slotSize})
	}
	d := &device{chip: memflash.NewChip(cfg...), tries: tries}
	fs := d.chip.Flashes()
	d.places = fs[:copies]
	for _, f := range fs[copies:] {
		d.slots = append(d.slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: f}}})
	}
	require.NoError(t, d.chip.Poke(copies, images[1], 0))
	if stored {
		require.NoError(t, d.record(t).Store(t.Context(), ota.BootState{Committed: true, Revert: ota.NoSlot}))
	}
	return d
}

// record returns the boot record as a new process sees it.
func (d *device) record(t *testing.T) *bootrecord.Record {
	r, err := bootrecord.New(d.places, &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return d.running, nil },
	})
	require.NoError(t, err)
	return r
}

func (d *device) boot(t *testing.T) (ota.Handover, error) {
	return ota.Boot(t.Context(), d.record(t), d.slots, nil)
}

func (d *device) open(t *testing.T) error {
	dev, err := ota.Open(t.Context(), d.record(t), d.slots, &ota.Options{
		Tries: d.tries,
		BootClock: func() (time.Duration, error) {
			if d.expired {
				return timeout, nil
			}
			return 0, nil
		},
		Reset: func(context.Context) error { return nil },
	})
	if err == nil {
		d.dev = dev
	}
	return err
}

// image is image v as it comes from outside. A bad one does not hold what its
// description says.
type image struct {
	v    int
	bad  bool
	read bool
}

func (i *image) part() ota.PartInfo {
	sum := sha256.Sum256(images[i.v])
	return ota.PartInfo{Name: "app", Size: slotSize, SHA256: &sum}
}

func (i *image) Info() ota.ImageInfo {
	return ota.ImageInfo{Security: security(i.v), Parts: []ota.PartInfo{i.part()}, SignedBy: []string{"key"}}
}

func (i *image) Next(context.Context) (*ota.ImagePart, error) {
	if i.read {
		return nil, io.EOF
	}
	i.read = true
	data := bytes.Clone(images[i.v])
	if i.bad {
		data[slotSize/2] ^= 1
	}
	return &ota.ImagePart{PartInfo: i.part(), Data: bytes.NewReader(data)}, nil
}

// call makes the call of a step.
func (d *device) call(t *testing.T, op string, arg int, bad bool) error {
	ctx, other := t.Context(), 1-d.running
	switch op {
	case "update":
		res, err := d.dev.Update(ctx, &image{v: arg, bad: bad}, &ota.UpdateOptions{CommitTimeout: timeout})
		if err == nil {
			require.Equal(t, other, res.Slot)
		}
		return err
	case "snapshot":
		_, err := d.dev.CreateSnapshot(ctx, &ota.SnapshotOptions{SetAsRevert: arg == 1, CommitTimeout: timeout})
		return err
	case "setbootstate":
		limit, none, no := timeout, ota.NoSlot, false
		return d.dev.SetBootState(ctx, []ota.BootStatePatch{
			{Active: &other, CommitTimeout: &limit},
			{Committed: &no, Revert: &other, CommitTimeout: &limit},
			{Revert: &other},
			{Revert: &none},
		}[arg])
	case "commit":
		if arg == 1 { // meant for the trial before this one
			return d.dev.CommitTrial(ctx, d.trials[max(0, len(d.trials)-2)])
		}
		s, err := d.dev.BootState(ctx)
		require.NoError(t, err)
		if s.Committed {
			return d.dev.Commit(ctx)
		}
		return d.dev.CommitTrial(ctx, s.Trial)
	case "revert":
		return d.dev.Revert(ctx)
	case "timeout":
		s, err := d.dev.BootState(ctx)
		require.NoError(t, err)
		if s.CommitTimeout == 0 { // a lost state has no time limit
			return d.dev.Revert(ctx)
		}
		d.expired = true
		defer func() { d.expired = false }()
		if err := d.dev.Watch(ctx); !errors.Is(err, ota.ErrReverted) {
			return fmt.Errorf("watch: %w", err)
		}
		return nil
	case "boot":
		h, err := d.boot(t)
		if err == nil {
			d.running = h.Slot
		}
		return err
	case "open":
		return d.open(t)
	}
	require.FailNow(t, "unknown step", op)
	return nil
}

// halves counts the half steps of the model on the chip: each visit of a copy or
// slot spoils it first and completes it then.
type halves struct {
	visits int
}

// plan cuts the power when n half steps of the next call are done, in one of the
// ways that the model does not tell apart.
func (d *device) plan(n int, rng *rand.Rand) *halves {
	h := &halves{}
	variants := []memflash.Fault{
		{Kind: memflash.CutPrefix, On: memflash.OpErase, N: 40},
		{Kind: memflash.CutBits, On: memflash.OpErase},
		{Kind: memflash.CutAfter, On: memflash.OpErase},
		{Kind: memflash.CutBefore, On: memflash.OpWrite},
		{Kind: memflash.CutPrefix, On: memflash.OpWrite, N: 40},
		{Kind: memflash.CutBits, On: memflash.OpWrite},
	}
	visit := n / 2
	if n%2 == 0 {
		visit--
		variants = []memflash.Fault{
			{Kind: memflash.CutAfter, On: memflash.OpWrite},
			{Kind: memflash.CutBefore, On: memflash.OpSync},
			{Kind: memflash.CutAfter, On: memflash.OpSync},
		}
	}
	fault := variants[rng.IntN(len(variants))]
	fault.Seed = rng.Uint64()
	arm := func(next int) {
		if h.visits == visit {
			fault.At = next
			d.chip.Plan(fault)
		}
	}
	arm(d.chip.Ops())
	if n == 0 {
		d.chip.Plan(memflash.Fault{Kind: memflash.CutBefore, At: d.chip.Ops()})
	}
	d.chip.OnOp(func(op memflash.Op) {
		if op.Kind == memflash.OpSync {
			h.visits++
			arm(op.Index + 1)
		}
	})
	return h
}

// text writes s as the traces do.
func text(s ota.BootState) string {
	bit := func(b bool) int {
		if b {
			return 1
		}
		return 0
	}
	mark := "?"
	switch {
	case s.Committed:
		mark = "+"
	case s.Last.Reason == ota.ReasonLost:
		mark = "!"
	}
	revert := "-"
	if s.Revert != ota.NoSlot {
		revert = s.Revert.String()
	}
	var held [2]int
	for i := range held {
		if ps := s.Slot(ota.SlotID(i)).Parts; len(ps) > 0 {
			for v := 1; v < len(images); v++ {
				if ps[0] == (ota.PartState{Size: slotSize, SHA256: sha256.Sum256(images[v])}) {
					held[i] = v
				}
			}
		}
	}
	a, b := s.Slot(0), s.Slot(1)
	return fmt.Sprintf("%d%s%s.%d%d.%d%d.%d%d.%d%d.%d", s.Active, mark, revert, s.Tries, bit(s.Booted),
		held[0], held[1], bit(a.Approved), bit(b.Approved), bit(a.Rejected), bit(b.Rejected), s.Floor)
}

// contents writes what the slots hold and what each copy of the record does.
func (d *device) contents(t *testing.T) string {
	var b strings.Builder
	for i := range d.slots {
		p := make([]byte, slotSize)
		require.NoError(t, d.chip.Peek(len(d.places)+i, p, 0))
		held := 0
		for v := 1; v < len(images); v++ {
			if bytes.Equal(p, images[v]) {
				held = v
			}
		}
		fmt.Fprint(&b, held)
	}
	var copies []string
	same := true
	for _, f := range d.places {
		// A record needs two places: twice this one.
		var twice []ota.Flash
		for range 2 {
			r, err := ota.Region(f, 0, f.Size())
			require.NoError(t, err)
			twice = append(twice, r)
		}
		r, err := bootrecord.New(twice, nil)
		require.NoError(t, err)
		c := "x"
		if s, err := r.Load(t.Context()); err == nil {
			c = text(s)
		}
		copies = append(copies, c)
		same = same && c == copies[0]
	}
	if same {
		copies = copies[:1]
	}
	return b.String() + " " + strings.Join(copies, ",")
}

// step carries out one line of a trace.
func (d *device) step(t *testing.T, line string, rng *rand.Rand) {
	head, rest, _ := strings.Cut(line, ":")
	var op, word, result, run, slots, copies string
	var arg, n int
	if k, err := fmt.Sscan(head, &op, &arg, &word); k == 0 {
		require.NoError(t, err, line)
	}
	_, err := fmt.Sscan(rest, &result, &n, &run, &slots, &copies)
	require.NoError(t, err, line)

	switch op {
	case "flip":
		require.NoError(t, d.chip.FlipBit(arg, 30, 3))
	case "lose":
		for i := range d.places {
			require.NoError(t, d.chip.FlipBit(i, 30, 3))
		}
	case "rot":
		require.NoError(t, d.chip.FlipBit(len(d.places)+arg, slotSize-1, 0))
	case "off":
		d.chip.PowerOff(memflash.LoseNone, 0)
	default:
		cut := result == "cut" || result == "killed"
		at := n
		if !cut {
			at = 1 << 20 // never
		}
		h := d.plan(at, rng)
		was := d.contents(t)
		h.visits = 0
		err := d.call(t, op, arg, word == "bad")
		d.chip.OnOp(nil)
		switch {
		case cut:
			if n > 0 {
				require.Zero(t, d.chip.Pending(), "the call has fewer than %d half steps", n)
			}
			d.chip.PowerOff(memflash.LoseNone, 0)
		default:
			require.Equal(t, n, 2*h.visits, "half steps")
		}
		d.chip.Plan()
		switch result {
		case "done":
			require.NoError(t, err)
		case "failed":
			require.Error(t, err)
		case "refused":
			d.refused(t, op, arg, err)
			require.Equal(t, was, d.contents(t), "a refused call has changed something")
		}
	}
	switch {
	case run == "off", strings.HasPrefix(run, "dead"):
		d.chip.PowerOff(memflash.LoseNone, 0)
		d.chip.PowerOn()
		d.dev = nil
	case strings.HasPrefix(run, "run"):
		require.Nil(t, d.dev)
	}
	if run != "off" {
		require.Equal(t, run[len(run)-1:], d.running.String(), "running slot")
	}
	require.Equal(t, slots+" "+copies, d.contents(t), "slots and copies of the record")
	require.NoError(t, d.chip.Err(), "misuse of the flash")
	if d.dev == nil {
		return
	}
	s, err := d.dev.BootState(t.Context())
	require.NoError(t, err)
	if !strings.ContainsAny(copies, "x,") {
		require.Equal(t, copies, text(s), "boot state in memory")
	}
	if !s.Committed && (len(d.trials) == 0 || d.trials[len(d.trials)-1] != s.Trial) {
		d.trials = append(d.trials, s.Trial)
	}
}

// refused checks why a call was refused.
func (d *device) refused(t *testing.T, op string, arg int, err error) {
	s, serr := d.dev.BootState(t.Context())
	require.NoError(t, serr)
	switch {
	case op == "setbootstate" && s.Active == 1-d.running:
		require.NoError(t, err) // it is so already
		return
	case op == "commit" && arg == 1 && s.Last.Outcome == ota.OutcomeCommitted && err == nil:
		return // answered as before
	}
	var e *ota.Error
	require.ErrorAs(t, err, &e)
	var known bool
	for _, want := range []error{ota.ErrNotCommitted, ota.ErrRebootPending, ota.ErrRollback, ota.ErrCommitted,
		ota.ErrReverted, ota.ErrWrongTrial, ota.ErrUnverifiedSlot, ota.ErrDigest} {
		known = known || errors.Is(err, want)
	}
	require.True(t, known, "%v", err)
}

// TestReplay has the real code take every step of the walks that Spin made
// through the model, with the power cut at the same places, and compares the
// slots, every copy of the boot record and the state in memory after each.
func TestReplay(t *testing.T) {
	files, err := filepath.Glob("testdata/traces/*.txt")
	require.NoError(t, err)
	traces, steps := 0, 0
	for _, file := range files {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, trace := range strings.Split(string(b), "trace ")[1:] {
			lines := strings.Split(strings.TrimSuffix(trace, "\n"), "\n")
			var name string
			var copies, tries, stored int
			_, err := fmt.Sscanf(lines[0], "%s copies=%d tries=%d stored=%d", &name, &copies, &tries, &stored)
			require.NoError(t, err)
			traces++
			steps += len(lines) - 1
			t.Run(name, func(t *testing.T) {
				d := newDevice(t, copies, tries, stored == 1)
				for i, line := range lines[1:] {
					ok := t.Run(fmt.Sprintf("%02d", i+1), func(t *testing.T) {
						d.step(t, line, rand.New(rand.NewPCG(uint64(traces), uint64(i))))
					})
					if !ok {
						require.FailNow(t, "step failed", "%s, step %d: %s", name, i+1, line)
					}
				}
			})
		}
	}
	require.GreaterOrEqual(t, traces, 200)
	t.Logf("%d traces, %d steps", traces, steps)
}
