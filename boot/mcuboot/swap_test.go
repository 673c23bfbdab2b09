package mcuboot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/loadertest"
)

// swapDevice is MCUboot in a swap mode, as far as its decisions and the trailers go
// (mcu-tools/mcuboot, boot/bootutil/src/loader.c, boot_validated_swap_type,
// boot_perform_update; swap_misc.c). The exchange itself can be cut off and goes on: both areas
// are copied to scratch, then a byte says so, then they are written back.
type swapDevice struct {
	areas   [2]ota.Flash // primary, secondary
	scratch ota.Flash
	status  ota.Flash
	align   int
	room    int64 // for images
}

const (
	noSwap   = 0x00
	copyBack = 0x10 // or the type of the swap
)

func (l *swapDevice) setStatus(b byte) error {
	if _, err := l.status.WriteAt([]byte{b}, 0); err != nil {
		return err
	}
	return l.status.Sync()
}

func overwrite(f ota.Flash, b []byte) error {
	if e, ok := f.(ota.Eraser); ok {
		if err := e.Erase(0, f.Size()); err != nil {
			return err
		}
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

// boot returns the image that is started.
func (l *swapDevice) boot(ctx context.Context) ([]byte, error) {
	var t [2]*Trailer
	var s [2]TrailerState
	for i, f := range l.areas {
		var err error
		if t[i], err = NewTrailer(f, l.align); err != nil {
			return nil, err
		}
		if s[i], err = t[i].Read(ctx); err != nil {
			return nil, err
		}
	}
	status := make([]byte, 1)
	if _, err := l.status.ReadAt(status, 0); err != nil {
		return nil, err
	}
	if err := l.setStatus(status[0]); err != nil { // settle what a cut has left
		return nil, err
	}
	typ := SwapType(status[0] &^ copyBack)
	if status[0] == noSwap {
		if typ = NextSwap(s[0], s[1]); typ == SwapTest || typ == SwapPerm {
			// An image that is not valid is never swapped in; its slot is erased.
			if !l.valid(ctx, 1) {
				if err := l.areas[1].(ota.Eraser).Erase(0, l.areas[1].Size()); err != nil {
					return nil, err
				}
				typ = SwapNone
			}
		}
		if typ != SwapNone {
			both := make([]byte, 2*l.room)
			for i := range 2 {
				if _, err := l.areas[1-i].ReadAt(both[int64(i)*l.room:int64(i+1)*l.room], 0); err != nil {
					return nil, err
				}
			}
			if err := overwrite(l.scratch, both); err != nil {
				return nil, err
			}
			if err := l.setStatus(copyBack | byte(typ)); err != nil {
				return nil, err
			}
		}
	}
	if typ != SwapNone && typ != 0 {
		both := make([]byte, 2*l.room)
		if _, err := l.scratch.ReadAt(both, 0); err != nil {
			return nil, err
		}
		for i := range 2 {
			if err := overwrite(l.areas[i], both[int64(i)*l.room:int64(i+1)*l.room]); err != nil {
				return nil, err
			}
		}
		if err := t[0].write(byte(typ), true, typ != SwapTest); err != nil {
			return nil, err
		}
		if err := l.setStatus(noSwap); err != nil {
			return nil, err
		}
	}
	if !l.valid(ctx, 0) {
		return nil, errors.New("no valid image in the primary area")
	}
	b := make([]byte, l.room)
	_, err := l.areas[0].ReadAt(b, 0)
	return b, err
}

func (l *swapDevice) valid(ctx context.Context, i int) bool {
	_, err := VerifyImage(ctx, l.areas[i], l.room, &VerifyOptions{AllowUnsigned: true})
	return err == nil
}

// swapKinds are the loaders that are simulated.
var swapKinds = []struct {
	name  string
	align int
	room  int64
	cfg   memflash.Config
}{
	// The loader programs flags of a trailer that were cut off.
	{"8", 8, 2048, memflash.Config{Size: 4096, EraseSize: 1024, WriteSize: 8, Rewrite: true}},
	{"4", 4, 2048, memflash.Config{Size: 4096, EraseSize: 512, Unsynced: true, Rewrite: true}},
	{"16", 16, 2048, memflash.Config{Size: 4096, EraseSize: 1024, WriteSize: 16, ErasedZero: true, Rewrite: true}},
	{"32", 32, 4096, memflash.Config{Size: 8192, EraseSize: 4096, WriteSize: 32, Rewrite: true}},
}

// blankTail returns b with what an erased flash has behind it.
func blankTail(f ota.Flash, b []byte, n int64) []byte {
	return append(bytes.Clone(b), bytes.Repeat([]byte{ota.ErasedByte(f)}, int(n)-len(b))...)
}

func swapped() (ls []loadertest.Loader) {
	old, next := build(Version{Major: 1}, make([]byte, 200), nil), build(Version{Major: 1, Revision: 1}, make([]byte, 300), nil)
	for _, k := range swapKinds {
		attach := func(fs []ota.Flash) *swapDevice {
			return &swapDevice{areas: [2]ota.Flash(fs), scratch: fs[2], status: fs[3], align: k.align, room: k.room}
		}
		ls = append(ls, loadertest.Loader{
			Name:    "swap-" + k.name,
			Flashes: []memflash.Config{k.cfg, k.cfg, {Size: 2 * k.room}, {Size: 1}},
			Format: func(fs []ota.Flash) error {
				return errors.Join(overwrite(fs[0], blankTail(fs[0], old, k.room)), overwrite(fs[1], blankTail(fs[1], next, k.room)))
			},
			Open: func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
				return NewSwap(&SwapConfig{Primary: fs[0], Secondary: fs[1], ImageSize: k.room, Align: k.align, Running: running})
			},
			Boot: func(ctx context.Context, fs []ota.Flash) (ota.SlotID, error) {
				b, err := attach(fs).boot(ctx)
				switch {
				case err != nil:
					return ota.NoSlot, err
				case bytes.HasPrefix(b, old):
					return 0, nil
				case bytes.HasPrefix(b, next):
					return 1, nil
				}
				return ota.NoSlot, errors.New("neither image")
			},
			Intact: func(fs []ota.Flash) error {
				l := attach(fs)
				if !l.valid(context.Background(), 0) || !l.valid(context.Background(), 1) {
					return errors.New("an image is lost")
				}
				return nil
			},
			Erases: true, // what is started is what is in the primary area
			Weak:   true, // a flag has one copy
		})
	}
	return ls
}

func TestSwapDevicePowerCuts(t *testing.T) {
	for _, l := range swapped() {
		l.Replay, l.Twice = *replay, *long
		l.PowerCuts(t)
	}
}

// app is an image of one part.
type app struct {
	data []byte
	done bool
}

func (a *app) Info() ota.ImageInfo {
	sum := sha256.Sum256(a.data)
	return ota.ImageInfo{Platform: "p", Version: "1", SignedBy: []string{"test"}, Parts: []ota.PartInfo{{Name: "app", Size: int64(len(a.data)), SHA256: &sum}}}
}

func (a *app) Next(context.Context) (*ota.ImagePart, error) {
	if a.done {
		return nil, io.EOF
	}
	a.done = true
	return &ota.ImagePart{PartInfo: a.Info().Parts[0], Data: bytes.NewReader(a.data)}, nil
}

// A device whose slots are found by the digests of what is in the areas: trials that
// are committed, given up, and not valid.
func TestSwapLife(t *testing.T) {
	ctx := t.Context()
	for _, k := range swapKinds {
		rec := memflash.Config{Size: bootrecord.MaxSize}
		chip := memflash.NewChip(append(slices.Repeat([]memflash.Config{rec}, 6), k.cfg, k.cfg, memflash.Config{Size: 2 * k.room}, memflash.Config{Size: 1})...)
		fs := chip.Flashes()
		l := &swapDevice{areas: [2]ota.Flash(fs[6:]), scratch: fs[8], status: fs[9], align: k.align, room: k.room}
		image := func(n uint16) []byte {
			return build(Version{Major: 1, Revision: n}, bytes.Repeat([]byte{byte(n)}, 100), nil)
		}
		require.NoError(t, overwrite(fs[6], blankTail(fs[6], image(0), k.room)))

		open := func() *ota.Device {
			t.Helper()
			current, err := bootrecord.New(fs[:3], nil)
			require.NoError(t, err)
			pending, err := bootrecord.New(fs[3:6], nil)
			require.NoError(t, err)
			c := SwapConfig{Primary: fs[6], Secondary: fs[7], ImageSize: k.room, Align: k.align}
			c.Running = ByDigest(&c, current, pending)
			d, err := NewSwap(&c)
			require.NoError(t, err)
			bl, err := driver.New(d, current, pending)
			require.NoError(t, err)
			var slots []ota.Slot
			for i := range 2 {
				f, err := d.Image(ctx, ota.SlotID(i))
				require.NoError(t, err)
				slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: f}}})
			}
			dev, err := ota.Open(ctx, bl, slots, &ota.Options{Platform: "p", BufferSize: 1024})
			require.NoError(t, err)
			return dev
		}
		reset := func(want uint16) *ota.Device {
			t.Helper()
			b, err := l.boot(ctx)
			require.NoError(t, err)
			require.True(t, bytes.HasPrefix(b, image(want)), "image %d runs, not %d", b[22], want)
			return open()
		}
		update := func(dev *ota.Device, n uint16) {
			t.Helper()
			res, err := dev.Update(ctx, &app{data: image(n)}, nil)
			require.NoError(t, err)
			require.NotEqual(t, dev.Running(), res.Slot)
		}
		state := func(dev *ota.Device, committed bool) {
			t.Helper()
			s, err := dev.BootState(ctx)
			require.NoError(t, err)
			require.Equal(t, committed, s.Committed)
			require.Equal(t, dev.Running(), s.Active)
		}

		dev := reset(0)
		require.EqualValues(t, 0, dev.Running())
		update(dev, 1)
		dev = reset(1)
		require.EqualValues(t, 1, dev.Running())
		state(dev, false)
		state(reset(0), true) // no commit
		dev = reset(0)
		update(dev, 2)
		dev = reset(2)
		require.EqualValues(t, 1, dev.Running())
		require.NoError(t, dev.Commit(ctx))
		for range 3 {
			dev = reset(2)
			state(dev, true)
		}
		update(dev, 3)
		dev = reset(3)
		require.EqualValues(t, 0, dev.Running())
		require.NoError(t, dev.Commit(ctx))
		state(reset(3), true)
		dev = reset(3)
		update(dev, 4)
		dev = reset(4)
		require.NoError(t, dev.Revert(ctx))
		dev = reset(3)
		state(dev, true)
		// An image that the loader refuses.
		res, err := dev.Update(ctx, &app{data: []byte("no image of MCUboot")}, nil)
		require.NoError(t, err)
		require.EqualValues(t, 1, res.Slot)
		dev = reset(3)
		state(dev, true)
		require.Equal(t, ota.ReasonBootloader, dev.Status().State.Last.Reason)
		update(dev, 5)
		require.NoError(t, reset(5).Commit(ctx))
		state(reset(5), true)
		// The same image in both slots.
		dev = reset(5)
		before := dev.Running()
		other, err := dev.CreateSnapshot(ctx, nil)
		require.NoError(t, err)
		require.NoError(t, dev.SetBootState(ctx, ota.BootStatePatch{Active: &other}))
		require.Equal(t, before, open().Running())
		dev = reset(5)
		require.Equal(t, other, dev.Running())
		require.NoError(t, dev.Commit(ctx))
		state(reset(5), true)
		require.NoError(t, chip.Err(), k.name)
	}
}

func TestSwapConfig(t *testing.T) {
	cfg := memflash.Config{Size: 4096, EraseSize: 1024, WriteSize: 8}
	fs := memflash.NewChip(cfg, cfg).Flashes()
	ctx := t.Context()
	running := func(context.Context) (ota.SlotID, error) { return 1, nil }
	good := SwapConfig{Primary: fs[0], Secondary: fs[1], ImageSize: 2048, Running: running}
	d, err := NewSwap(&good)
	require.NoError(t, err)
	for name, change := range map[string]func(*SwapConfig){
		"no primary": func(c *SwapConfig) { c.Primary = nil }, "no secondary": func(c *SwapConfig) { c.Secondary = nil },
		"no running": func(c *SwapConfig) { c.Running = nil }, "image": func(c *SwapConfig) { c.Image = 16 },
		"align": func(c *SwapConfig) { c.Align = 5 }, "no room": func(c *SwapConfig) { c.ImageSize = 0 },
		"too large": func(c *SwapConfig) { c.ImageSize = 4096 }, "units": func(c *SwapConfig) { c.ImageSize = 2047 },
	} {
		c := good
		change(&c)
		_, err := NewSwap(&c)
		require.ErrorIs(t, err, ota.ErrInvalid, name)
	}
	_, err = NewSwap(nil)
	require.ErrorIs(t, err, ota.ErrInvalid)

	trial := func(x ota.SlotID) driver.Choice {
		return driver.Choice{Active: x, Trial: true, Revert: 1 - x, Tries: 1}
	}
	require.ErrorIs(t, d.Write(ctx, trial(1)), ota.ErrUnsupported)
	require.ErrorIs(t, d.Write(ctx, trial(2)), ota.ErrUnknownSlot)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 2}), ota.ErrInvalid)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1}), ota.ErrInvalid)
	_, err = d.Image(ctx, 2)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
	check := func(write, want driver.Choice) {
		t.Helper()
		require.NoError(t, d.Write(ctx, write))
		got, err := d.Read(ctx)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	committed := func(x ota.SlotID) driver.Choice { return driver.Choice{Active: x, Revert: ota.NoSlot} }
	check(trial(0), trial(0))
	check(trial(0), trial(0))
	check(committed(1), committed(1))
	check(committed(0), committed(0)) // for good
	check(trial(0), trial(0))
	check(driver.Choice{Active: 0, Trial: true, Revert: 1, Booted: true}, committed(1))

	// What is in no area, or cannot be read, is not guessed.
	rec, err := bootrecord.New(memflash.NewChip(slices.Repeat([]memflash.Config{{Size: bootrecord.MaxSize}}, 3)...).Flashes(), nil)
	require.NoError(t, err)
	id, err := ByDigest(&good, rec)(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 0, id, "a new device")
	other := func(b byte) ota.SlotState {
		return ota.SlotState{Parts: []ota.PartState{{Size: 3, SHA256: sha256.Sum256([]byte{b, b, b})}}}
	}
	require.NoError(t, rec.Store(ctx, ota.BootState{Active: 1, Committed: true, Revert: ota.NoSlot, Slots: []ota.SlotState{other(1), other(2)}}))
	_, err = ByDigest(&good, rec)(ctx)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
	_, err = fs[1].WriteAt([]byte{2, 2, 2, 0xff, 0xff, 0xff, 0xff, 0xff}, 0)
	require.NoError(t, err)
	id, err = ByDigest(&good, rec)(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 0, id, "because slot 1 is in the secondary area")
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	_, err = ByDigest(&good, rec)(canceled)
	require.ErrorIs(t, err, context.Canceled)
	_, err = ByDigest(&good, failingRecord{})(ctx)
	require.ErrorContains(t, err, "bus error")
}

type failingRecord struct{ ota.Bootloader }

func (failingRecord) Load(context.Context) (ota.BootState, error) {
	return ota.BootState{}, fmt.Errorf("bus error")
}

func TestSwapConformance(t *testing.T) {
	for _, l := range swapped() {
		t.Run(l.Name, l.Conformance)
	}
}
