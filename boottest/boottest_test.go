package boottest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

func rules(err error) (names []string) {
	if err == nil {
		return nil
	}
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		var v *Violation
		if errors.As(e, &v) {
			names = append(names, v.Rule)
		}
	}
	return names
}

// record opens a boot record on a chip of its own.
func record(cfg memflash.Config, copies int) func() (*bootrecord.Record, *memflash.Chip, error) {
	var cfgs []memflash.Config
	for range copies {
		cfgs = append(cfgs, cfg)
	}
	chip := memflash.NewChip(cfgs...)
	return func() (*bootrecord.Record, *memflash.Chip, error) {
		r, err := bootrecord.New(chip.Flashes(), &bootrecord.Options{
			Running: func(context.Context) (ota.SlotID, error) { return 1, nil },
		})
		return r, chip, err
	}
}

func TestGood(t *testing.T) {
	for copies := 2; copies <= 4; copies++ {
		for _, cfg := range []memflash.Config{{Size: 4096}, {Size: 4096, EraseSize: 4096, Unsynced: true}} {
			open := record(cfg, copies)
			Run(t, func(t *testing.T) ota.Bootloader {
				r, chip, err := open()
				require.NoError(t, err)
				return OnChip(r, chip)
			})
		}
	}
}

// Without a Faulter what does not need one is checked.
func TestWithoutFaults(t *testing.T) {
	open := record(memflash.Config{Size: 4096}, 3)
	opened := 0
	require.NoError(t, Check(t.Context(), func() (ota.Bootloader, error) {
		r, _, err := open()
		opened++
		return r, err
	}))
	require.Greater(t, opened, 10)
}

func TestCannotOpen(t *testing.T) {
	bad := errors.New("no device")
	require.ErrorIs(t, Check(t.Context(), func() (ota.Bootloader, error) { return nil, bad }), bad)
	require.ErrorContains(t, Check(t.Context(), func() (ota.Bootloader, error) { return nil, nil }), "no bootloader")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, Check(ctx, func() (ota.Bootloader, error) { return bootrecordOn(t), nil }), context.Canceled)
}

func bootrecordOn(t *testing.T) ota.Bootloader {
	r, _, err := record(memflash.Config{Size: 4096}, 3)()
	require.NoError(t, err)
	return r
}

// Doubles, each with one thing wrong.

type withoutHeal struct{ ota.Bootloader }

// as makes a double of the record.
type as func(*bootrecord.Record) ota.Bootloader

type zeroState struct{ *bootrecord.Record }

func (b zeroState) Load(ctx context.Context) (ota.BootState, error) {
	s, err := b.Record.Load(ctx)
	if errors.Is(err, ota.ErrNoBootState) {
		return ota.BootState{}, nil
	}
	return s, err
}

type otherError struct{ *bootrecord.Record }

func (b otherError) Load(ctx context.Context) (ota.BootState, error) {
	s, err := b.Record.Load(ctx)
	if err != nil {
		err = errors.New("oops")
	}
	return s, err
}

type forgetsFields struct{ *bootrecord.Record }

func (b forgetsFields) Store(ctx context.Context, s ota.BootState) error {
	return b.Record.Store(ctx, ota.BootState{Active: s.Active, Committed: s.Committed, Revert: s.Revert, Tries: s.Tries})
}

// lazy stores when the next state comes.
type lazy struct {
	*bootrecord.Record
	mu sync.Mutex
	s  *ota.BootState
}

func (b *lazy) Store(ctx context.Context, s ota.BootState) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s = s.Clone()
	b.s = &s
	return nil
}

func (b *lazy) Load(ctx context.Context) (ota.BootState, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.s != nil {
		return b.s.Clone(), nil
	}
	return b.Record.Load(ctx)
}

type needsLoad struct {
	*bootrecord.Record
	loaded bool
	mu     sync.Mutex
}

func (b *needsLoad) Load(ctx context.Context) (ota.BootState, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.loaded = true
	return b.Record.Load(ctx)
}

func (b *needsLoad) Store(ctx context.Context, s ota.BootState) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.loaded {
		return errors.New("not loaded")
	}
	return b.Record.Store(ctx, s)
}

type swallowsErrors struct{ *bootrecord.Record }

func (b swallowsErrors) Store(ctx context.Context, s ota.BootState) error {
	b.Record.Store(ctx, s)
	return nil
}

type runsWhatIsStored struct{ *bootrecord.Record }

func (b runsWhatIsStored) Running(ctx context.Context) (ota.SlotID, error) {
	s, err := b.Load(ctx)
	return s.Active, err
}

type runsNothing struct{ *bootrecord.Record }

func (b runsNothing) Running(context.Context) (ota.SlotID, error) { return ota.NoSlot, nil }

type cannotTell struct{ *bootrecord.Record }

func (b cannotTell) Running(context.Context) (ota.SlotID, error) {
	return ota.NoSlot, errors.New("no idea")
}

type clampsSlots struct{ *bootrecord.Record }

func (b clampsSlots) Store(ctx context.Context, s ota.BootState) error {
	s.Active, s.Revert = min(max(s.Active, 0), 7), min(max(s.Revert, -1), 7)
	return b.Record.Store(ctx, s)
}

// caches keeps what was stored in memory.
type caches struct {
	*bootrecord.Record
	mu *sync.Mutex
	s  **ota.BootState
}

func (b caches) Store(ctx context.Context, s ota.BootState) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.Record.Store(ctx, s)
	if err == nil {
		*b.s = &s
	}
	return err
}

func (b caches) Load(ctx context.Context) (ota.BootState, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if *b.s != nil {
		return **b.s, nil
	}
	return b.Record.Load(ctx)
}

// oneAtATime fails if it is used twice at the same time.
type oneAtATime struct {
	*bootrecord.Record
	busy *sync.Mutex
}

func (b oneAtATime) Load(ctx context.Context) (ota.BootState, error) {
	if !b.busy.TryLock() {
		return ota.BootState{}, errors.New("busy")
	}
	defer b.busy.Unlock()
	for range 50 {
		runtime.Gosched() // for somebody else to come
	}
	return b.Record.Load(ctx)
}

func (b oneAtATime) Store(ctx context.Context, s ota.BootState) error {
	b.busy.Lock()
	defer b.busy.Unlock()
	return b.Record.Store(ctx, s)
}

type healsToFactory struct{ *bootrecord.Record }

func (b healsToFactory) Heal(ctx context.Context) (ota.BootState, error) {
	s, err := b.Record.Heal(ctx)
	if err == nil {
		s = ota.BootState{Committed: true, Revert: ota.NoSlot}
	}
	return s, err
}

type hidesContext struct{ *bootrecord.Record }

func (b hidesContext) Store(ctx context.Context, s ota.BootState) error {
	if err := b.Record.Store(ctx, s); err != nil {
		return fmt.Errorf("no: %v", err)
	}
	return nil
}

type panicking struct{ *bootrecord.Record }

func (b panicking) Store(ctx context.Context, s ota.BootState) error {
	_ = s.Slots[1]
	return b.Record.Store(ctx, s)
}

type absentIfUnreadable struct{ *bootrecord.Record }

func (b absentIfUnreadable) Load(ctx context.Context) (ota.BootState, error) {
	s, err := b.Record.Load(ctx)
	if h := b.Health(); err == nil && h.Good < h.Copies {
		return s, ota.ErrNoBootState
	}
	return s, err
}

// inPlace keeps one copy of the state on flash and replaces it in place. With
// sum a damaged one is not an empty one.
type inPlace struct {
	f   ota.Flash
	mu  sync.Mutex
	sum bool
}

func (b *inPlace) Running(context.Context) (ota.SlotID, error) { return 0, nil }

func (b *inPlace) Load(context.Context) (s ota.BootState, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	buf := make([]byte, b.f.Size())
	if _, err := b.f.ReadAt(buf, 0); err != nil {
		if b.sum {
			return s, ota.ErrNoBootState
		}
		return s, err
	}
	if buf[0] == 0 && buf[1] == 0 {
		return s, ota.ErrNoBootState
	}
	n := int(buf[0])<<8 | int(buf[1])
	type plain ota.BootState // without the JSON form
	var p plain
	if err := json.Unmarshal(buf[2:2+min(n, len(buf)-2)], &p); err != nil {
		return s, fmt.Errorf("%w: %w", err, ota.ErrBadBootState)
	}
	return ota.BootState(p), nil
}

func (b *inPlace) Store(_ context.Context, s ota.BootState) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if max(s.Active, s.Revert) >= ota.MaxSlots || min(s.Active, s.Revert) < ota.NoSlot {
		return ota.ErrUnknownSlot
	}
	type plain ota.BootState
	buf, err := json.Marshal(plain(s))
	if err != nil {
		return err
	}
	// In small pieces, the length last.
	for off := 0; off < len(buf); off += 512 {
		if _, err := b.f.WriteAt(buf[off:min(off+512, len(buf))], int64(off)+2); err != nil {
			return err
		}
	}
	if _, err := b.f.WriteAt([]byte{byte(len(buf) >> 8), byte(len(buf))}, 0); err != nil {
		return err
	}
	return b.f.Sync()
}

func TestSabotage(t *testing.T) {
	for name, tc := range map[string]struct {
		rule string
		as   as
	}{
		"returns a zero state at first":    {"none", func(r *bootrecord.Record) ota.Bootloader { return zeroState{r} }},
		"returns another error at first":   {"none", func(r *bootrecord.Record) ota.Bootloader { return otherError{r} }},
		"keeps some fields":                {"round-trip", func(r *bootrecord.Record) ota.Bootloader { return forgetsFields{r} }},
		"stores later":                     {"durable", func(r *bootrecord.Record) ota.Bootloader { return withoutHeal{&lazy{Record: r}} }},
		"must load before it stores":       {"store", func(r *bootrecord.Record) ota.Bootloader { return &needsLoad{Record: r} }},
		"swallows errors":                  {"atomic", func(r *bootrecord.Record) ota.Bootloader { return swallowsErrors{r} }},
		"runs what is stored":              {"running", func(r *bootrecord.Record) ota.Bootloader { return runsWhatIsStored{r} }},
		"runs no slot":                     {"running", func(r *bootrecord.Record) ota.Bootloader { return runsNothing{r} }},
		"cannot tell what runs":            {"running", func(r *bootrecord.Record) ota.Bootloader { return cannotTell{r} }},
		"replaces unknown slots":           {"unknown-slot", func(r *bootrecord.Record) ota.Bootloader { return clampsSlots{r} }},
		"shares memory":                    {"alias", func(r *bootrecord.Record) ota.Bootloader { return caches{r, new(sync.Mutex), new(*ota.BootState)} }},
		"cannot be loaded twice at a time": {"concurrent", func(r *bootrecord.Record) ota.Bootloader { return oneAtATime{r, new(sync.Mutex)} }},
		"heals to another state":           {"heal", func(r *bootrecord.Record) ota.Bootloader { return healsToFactory{r} }},
		"hides the context's error":        {"context", func(r *bootrecord.Record) ota.Bootloader { return hidesContext{r} }},
		"panics":                           {"panic", func(r *bootrecord.Record) ota.Bootloader { return panicking{r} }},
		"takes unreadable for absent":      {"read-error", func(r *bootrecord.Record) ota.Bootloader { return absentIfUnreadable{r} }},
	} {
		t.Run(name, func(t *testing.T) {
			open := record(memflash.Config{Size: 4096, EraseSize: 4096}, 3)
			err := Check(t.Context(), func() (ota.Bootloader, error) {
				r, chip, err := open()
				return OnChip(tc.as(r), chip), err
			})
			require.Error(t, err)
			require.Contains(t, rules(err), tc.rule, "%v", err)
			require.NotContains(t, err.Error(), "%!")
		})
	}
	for name, tc := range map[string]struct {
		rules []string
		sum   bool
	}{
		"one copy":                       {[]string{"first-store", "atomic", "dropped"}, false},
		"one copy, unreadable is absent": {[]string{"first-store", "atomic", "dropped", "read-error"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			chip := memflash.NewChip(memflash.Config{Size: 16 << 10})
			err := Check(t.Context(), func() (ota.Bootloader, error) {
				return OnChip(&inPlace{f: chip.Flashes()[0], sum: tc.sum}, chip), nil
			})
			require.Equal(t, tc.rules, rules(err), "%v", err)
			require.NotContains(t, err.Error(), "%!")
		})
	}
}

func TestViolation(t *testing.T) {
	v := &Violation{"store", ota.ErrBusy}
	require.EqualError(t, v, "boottest: rule store: "+ota.ErrBusy.Error())
	require.ErrorIs(t, v, ota.ErrBusy)
}
