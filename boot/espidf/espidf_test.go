package espidf

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/loadertest"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

func read(t testing.TB, name string) []byte {
	b, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	return b
}

// open returns a driver for two OTA partitions and what otadata holds.
func open(t testing.TB, otadata []byte, c Config) (*Driver, ota.Flash) {
	f := memflash.New(memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: 4})
	for i := range 2 {
		if e := otadata[i*0x1000:][:EntrySize]; !filled(e, 0xff) {
			_, err := f.WriteAt(e, int64(i)*0x1000)
			require.NoError(t, err)
		}
	}
	c.OTAData = f
	if c.Apps == 0 {
		c.Apps = 2
	}
	if c.Running == nil {
		c.Running = func(context.Context) (ota.SlotID, error) { return 0, nil }
	}
	d, err := New(&c)
	require.NoError(t, err)
	return d, f
}

func TestGoldenOTAData(t *testing.T) {
	for _, tc := range []struct {
		name string
		want [2]Entry
		c    driver.Choice
	}{
		{"otadata-seq1-valid.bin", [2]Entry{NewEntry(1, StateValid)}, driver.Choice{Active: 0, Revert: ota.NoSlot}},
		{"otadata-seq2-new.bin", [2]Entry{NewEntry(1, StateValid), NewEntry(2, StateNew)}, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}},
		{"otadata-seq2-pending.bin", [2]Entry{NewEntry(1, StateValid), NewEntry(2, StatePending)}, driver.Choice{Active: 1, Trial: true, Revert: 0, Booted: true}},
		{"otadata-seq2-aborted.bin", [2]Entry{NewEntry(1, StateValid), NewEntry(2, StateAborted)}, driver.Choice{Active: 0, Revert: ota.NoSlot}},
	} {
		raw := read(t, tc.name)
		for i := range 2 {
			b := raw[i*0x1000:]
			e, err := ParseEntry(b)
			require.NoError(t, err)
			require.Equal(t, b[:EntrySize], e.Bytes())
			if tc.want[i] == (Entry{}) {
				require.False(t, e.Sound())
				continue
			}
			require.Equal(t, tc.want[i], e)
		}
		d, _ := open(t, raw, Config{})
		c, err := d.Read(t.Context())
		require.NoError(t, err)
		require.Equal(t, tc.c, c, tc.name)
	}
	// Mongoose OS shipped entries with a checksum over all bytes, which later
	// loaders do not accept either.
	old := []byte{1, 0, 0, 0, 0x10, 31: 0}
	binary.LittleEndian.PutUint32(old[28:], 0x157a2b85)
	e, err := ParseEntry(old)
	require.NoError(t, err)
	require.False(t, e.Sound())
	_, err = ParseEntry(old[:31])
	require.ErrorIs(t, err, ota.ErrTooSmall)
}

// TestUnknownState: one bit of the state is wrong behind a good checksum, as after
// a write by another program that was cut off.
func TestUnknownState(t *testing.T) {
	for bit := range 32 {
		for _, from := range []State{StateNew, StatePending} {
			s := from ^ 1<<bit
			raw := bytes.Repeat([]byte{0xff}, 0x2000)
			copy(raw, NewEntry(1, StateValid).Bytes())
			copy(raw[0x1000:], NewEntry(2, s).Bytes())
			d, _ := open(t, raw, Config{})
			c, err := d.Read(t.Context())
			require.NoError(t, err)
			switch s {
			case StateInvalid, StateAborted:
				require.Equal(t, driver.Choice{Active: 0, Revert: ota.NoSlot}, c)
			case StateValid:
				require.Equal(t, driver.Choice{Active: 1, Revert: ota.NoSlot, Worn: true}, c)
			case StateNew:
				require.Equal(t, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}, c)
			default:
				require.Equal(t, driver.Choice{Active: 1, Trial: true, Revert: 0, Booted: true}, c, "%v", s)
			}
		}
	}
}

// TestNeverAnotherState: a trial that is written at every way to cut it is never
// found in a state that is not on trial; the commit, never in doubt.
func TestNeverAnotherState(t *testing.T) {
	ctx := t.Context()
	raw := read(t, "otadata-seq1-valid.bin")
	n := 0
	for _, unit := range []int64{1, 4, 16} {
		for at := 0; ; at++ {
			struck := false
			for seed := range uint64(60) {
				chip := memflash.NewChip(memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: unit})
				require.NoError(t, chip.Poke(0, raw[:EntrySize], 0))
				d, err := New(&Config{OTAData: chip.Flashes()[0], Apps: 2, Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
				require.NoError(t, err)
				chip.Plan(memflash.Fault{Kind: memflash.CutBits, At: at, Seed: seed})
				err = d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1})
				if chip.Pending() > 0 {
					require.NoError(t, err)
					continue
				}
				struck = true
				n++
				chip.PowerOn()
				c, err := d.Read(ctx)
				require.NoError(t, err)
				c.Worn = false
				if c.Trial {
					require.Equal(t, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}, c)
				} else {
					require.Equal(t, driver.Choice{Active: 0, Revert: ota.NoSlot}, c)
				}
			}
			if !struck {
				break
			}
		}
	}
	t.Logf("%d cuts", n)
}

// boot does what the loader does, with and without support for rollback.
func boot(f ota.Flash, apps int, rollback bool) (int, error) {
	var es [2]Entry
	write := func(i int) error {
		off := int64(i) * 0x1000
		if e, ok := f.(ota.Eraser); ok {
			if err := e.Erase(off, 0x1000); err != nil {
				return err
			}
		}
		if _, err := f.WriteAt(es[i].Bytes(), off); err != nil {
			return err
		}
		return f.Sync()
	}
	for i := range es {
		b := make([]byte, EntrySize)
		if _, err := f.ReadAt(b, int64(i)*0x1000); err != nil {
			return 0, err
		}
		es[i], _ = ParseEntry(b)
		if rollback && es[i].State == StatePending {
			es[i].State = StateAborted
			if err := write(i); err != nil {
				return 0, err
			}
		}
	}
	active := -1
	for i, e := range es {
		if e.Seq != noSeq && e.State != StateInvalid && e.State != StateAborted && e.CRC == seqCRC(e.Seq) && (active < 0 || e.Seq > es[active].Seq) {
			active = i
		}
	}
	if active < 0 {
		return -1, nil
	}
	if rollback && es[active].State == StateNew {
		es[active].State = StatePending
		if err := write(active); err != nil {
			return 0, err
		}
	}
	return int((es[active].Seq - 1) % uint32(apps)), nil
}

// renumber lets a device have its factory partition as slot 0, and ota_0 as 1.
type renumber struct{ *Driver }

func (r renumber) Running(ctx context.Context) (ota.SlotID, error) { return r.c.Running(ctx) }

func (r renumber) Read(ctx context.Context) (driver.Choice, error) {
	c, err := r.Driver.Read(ctx)
	for _, id := range []*ota.SlotID{&c.Active, &c.Revert} {
		if *id >= 0 {
			*id = 1 - *id
		}
	}
	return c, err
}

func (r renumber) Write(ctx context.Context, c driver.Choice) error {
	c.Active = 1 - c.Active
	if c.Revert >= 0 {
		c.Revert = 1 - c.Revert
	}
	return r.Driver.Write(ctx, c)
}

func loaders() (ls []loadertest.Loader) {
	for _, k := range []struct {
		name        string
		cfg         memflash.Config
		apps        int
		pessimistic bool
	}{
		{"nor", memflash.Config{Size: 0x2000, EraseSize: 0x1000}, 2, false},
		{"nor-16", memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: 16, Unsynced: true}, 2, false},
		{"nor-32", memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: 32}, 2, false},
		{"file", memflash.Config{Size: 0x2000, Unsynced: true}, 2, false},
		{"five-apps", memflash.Config{Size: 0x3000, EraseSize: 0x1000, WriteSize: 4}, 5, false},
		{"pessimistic", memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: 4}, 2, true},
		{"factory", memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: 4}, 1, false},
		{"factory-pessimistic", memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: 4}, 1, true},
	} {
		factory := k.apps == 1
		open := func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (*Driver, error) {
			return New(&Config{OTAData: fs[0], Apps: k.apps, Factory: factory, PessimisticFirstBoot: k.pessimistic, Running: running})
		}
		ls = append(ls, loadertest.Loader{
			Name:    k.name,
			Flashes: []memflash.Config{k.cfg},
			Open: func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
				if running == nil {
					running = func(context.Context) (ota.SlotID, error) { return 0, nil }
				}
				d, err := open(fs, running)
				if factory {
					return renumber{d}, err
				}
				return d, err
			},
			Boot: func(ctx context.Context, fs []ota.Flash) (ota.SlotID, error) {
				n, err := boot(fs[0], k.apps, !k.pessimistic)
				if err != nil {
					return ota.NoSlot, err
				}
				id := ota.SlotID(n)
				if n < 0 {
					id = 0
					if factory {
						id = 1
					}
				}
				// The firmware does this first.
				d, err := open(fs, func(context.Context) (ota.SlotID, error) { return id, nil })
				if err != nil {
					return ota.NoSlot, err
				}
				err = d.FirstBoot(ctx)
				if errors.Is(err, ota.ErrNoBootState) {
					err = nil
				}
				if factory {
					id = 1 - id
				}
				return id, err
			},
			Weak: true, // two copies cannot tell
		})
	}
	return ls
}

func TestConformance(t *testing.T) {
	for _, l := range loaders() {
		// The factory partition cannot be on trial.
		if l.Name != "factory" && l.Name != "factory-pessimistic" {
			t.Run(l.Name, l.Conformance)
		}
	}
}

func TestPowerCuts(t *testing.T) {
	for _, l := range loaders() {
		// Two writes in a row that read well at times, on a medium that is not
		// erased before it is written, are more than two copies can tell.
		l.Replay, l.Twice = *replay, *long && l.Name != "file"
		l.PowerCuts(t)
	}
}

// TestWrite goes from every choice to every other one of three slots and a factory
// partition, and checks what the loader does then.
func TestWrite(t *testing.T) {
	ctx := t.Context()
	const factory = 3
	var choices []driver.Choice
	for x := range ota.SlotID(4) {
		choices = append(choices, driver.Choice{Active: x, Revert: ota.NoSlot})
		for y := range ota.SlotID(4) {
			if x != y && x != factory {
				choices = append(choices, driver.Choice{Active: x, Trial: true, Revert: y, Tries: 1})
				choices = append(choices, driver.Choice{Active: x, Trial: true, Revert: y, Booted: true})
			}
		}
	}
	for _, from := range choices {
		for _, to := range choices {
			d, f := open(t, read(t, "otadata-seq1-valid.bin"), Config{Apps: 3, Factory: true})
			for _, c := range []driver.Choice{from, to} {
				require.NoError(t, d.Write(ctx, c), "%+v to %+v", from, to)
				got, err := d.Read(ctx)
				require.NoError(t, err)
				require.False(t, got.Worn, "%+v to %+v, %+v", from, to, c)
				require.Equal(t, c, got)
			}
			next := to.Active
			if to.Trial && to.Booted {
				next = to.Revert
			}
			for _, want := range []ota.SlotID{next, map[bool]ota.SlotID{false: next, true: to.Revert}[to.Trial]} {
				got, err := boot(f, 3, true)
				require.NoError(t, err)
				if got < 0 {
					got = factory
				}
				require.Equal(t, want, ota.SlotID(got), "%+v to %+v", from, to)
			}
		}
	}
}

// TestTransitions cuts the power at every step from every choice to every other one.
// The loader never starts a slot that neither of them names: not ota_0 by default,
// nor one that an old entry selects.
func TestTransitions(t *testing.T) {
	ctx := t.Context()
	runs := 0
	for _, factory := range []bool{false, true} {
		n := ota.SlotID(4)
		if factory {
			n = 3
		}
		var choices []driver.Choice
		for x := range n {
			choices = append(choices, driver.Choice{Active: x, Revert: ota.NoSlot})
			for y := range n {
				if x != y && x != 2 {
					choices = append(choices, driver.Choice{Active: x, Trial: true, Revert: y, Tries: 1})
					choices = append(choices, driver.Choice{Active: x, Trial: true, Revert: y, Booted: true})
				}
			}
		}
		apps := 4
		if factory {
			apps = 2 // and slot 2
		}
		open := func(chip *memflash.Chip) *Driver {
			d, err := New(&Config{OTAData: chip.Flashes()[0], Apps: apps, Factory: factory, Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
			require.NoError(t, err)
			return d
		}
		for _, from := range choices {
			base := memflash.NewChip(memflash.Config{Size: 0x2000, EraseSize: 0x1000, WriteSize: 4})
			require.NoError(t, open(base).Write(ctx, from))
			for _, to := range choices {
				allowed := []ota.SlotID{from.Active, from.Revert, to.Active, to.Revert}
				for at, done := 0, false; !done; at++ {
					for _, f := range memflash.TearModes(uint64(at)) {
						if f.Kind == memflash.CutWeak {
							continue
						}
						chip := base.Clone()
						f.At = at
						chip.Plan(f)
						err := open(chip).Write(ctx, to)
						if done = chip.Pending() > 0; done {
							require.NoError(t, err)
							break
						}
						runs++
						chip.PowerOn()
						for range 3 {
							got, err := boot(chip.Flashes()[0], apps, true)
							require.NoError(t, err)
							if got < 0 {
								got = 0
								if factory {
									got = 2
								}
							}
							require.Contains(t, allowed, ota.SlotID(got), "from %+v to %+v: %+v", from, to, f)
						}
					}
				}
			}
		}
	}
	t.Logf("%d cuts", runs)
}

func TestRefusals(t *testing.T) {
	ctx := t.Context()
	run := func(context.Context) (ota.SlotID, error) { return 0, nil }
	f := memflash.New(memflash.Config{Size: 0x2000, EraseSize: 0x1000})
	for _, c := range []*Config{
		nil, {}, {OTAData: f, Apps: 2}, {Apps: 2, Running: run}, {OTAData: f, Apps: 1, Running: run}, {OTAData: f, Apps: 8, Factory: true, Running: run},
		{OTAData: memflash.New(memflash.Config{Size: 0x1000, EraseSize: 0x1000}), Apps: 2, Running: run},
		{OTAData: memflash.New(memflash.Config{Size: 0x2000, EraseSize: 0x2000}), Apps: 2, Running: run},
		{OTAData: memflash.New(memflash.Config{Size: 0x2000, EraseSize: 0x1000, ErasedZero: true}), Apps: 2, Running: run},
	} {
		_, err := New(c)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	d, _ := open(t, bytes.Repeat([]byte{0xff}, 0x2000), Config{})
	_, err := d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 2, Revert: ota.NoSlot}), ota.ErrUnknownSlot)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 1}), ota.ErrUnknownSlot)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 2}), ota.ErrInvalid)
	raw := bytes.Repeat([]byte{0xff}, 0x2000)
	copy(raw, NewEntry(0xfffffffe, StateValid).Bytes())
	d, _ = open(t, raw, Config{})
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 1}), ota.ErrBadBootState)
	copy(raw, NewEntry(1, StateAborted).Bytes())
	copy(raw[0x1000:], NewEntry(2, StateInvalid).Bytes())
	d, _ = open(t, raw, Config{})
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrBadBootState)
	d, _ = open(t, raw, Config{Factory: true, Apps: 1})
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}), ota.ErrUnsupported)
}

func TestTable(t *testing.T) {
	raw := read(t, "parts.bin")
	tab, err := ParseTable(raw)
	require.NoError(t, err)
	require.Equal(t, []Partition{
		{Type: TypeData, Subtype: SubtypeNVS, Offset: 0x9000, Size: 0x4000, Label: "nvs"},
		{Type: TypeData, Subtype: SubtypeOTAData, Offset: 0xd000, Size: 0x2000, Label: "otadata"},
		{Type: TypeData, Subtype: 1, Offset: 0xf000, Size: 0x1000, Label: "phy_init"},
		{Type: TypeApp, Subtype: SubtypeOTA0, Offset: 0x10000, Size: 0x100000, Label: "ota_0"},
		{Type: TypeApp, Subtype: SubtypeOTA0 + 1, Offset: 0x110000, Size: 0x100000, Label: "ota_1"},
	}, tab.Partitions)
	again, err := tab.Bytes()
	require.NoError(t, err)
	require.Equal(t, raw, again)
	apps, err := tab.Apps()
	require.NoError(t, err)
	require.Equal(t, tab.Partitions[3:], apps)
	_, ok := tab.Find(TypeApp, SubtypeFactory)
	require.False(t, ok)
	p, ok := tab.Find(TypeData, SubtypeOTAData)
	require.True(t, ok)
	f, err := Region(memflash.New(memflash.Config{Size: 4 << 20, EraseSize: 0x1000}), p)
	require.NoError(t, err)
	require.Equal(t, int64(0x2000), f.Size())

	for i := range 0xc0 { // every byte counts
		bad := bytes.Clone(raw)
		bad[i] ^= 4
		_, err := ParseTable(bad)
		if i >= 0xa2 && i < 0xb0 {
			continue // the filling of the entry with the digest
		}
		require.ErrorIs(t, err, ErrTable, "byte %#x", i)
	}
	for _, n := range []int{0, 31, 0xa0, 0xc0} {
		_, err := ParseTable(raw[:n])
		require.ErrorIs(t, err, ErrTable, "%d bytes", n)
	}
	bad := bytes.Clone(raw)
	bad[0xc5] = 0xe3
	_, err = ParseTable(bad)
	require.ErrorIs(t, err, ErrTable)
	_, err = (&Table{Partitions: []Partition{{Offset: 0x1000, Size: 0x2000}, {Offset: 0x2000, Size: 0x1000}}}).Bytes()
	require.ErrorIs(t, err, ErrTable)
	_, err = (&Table{Partitions: []Partition{{Label: "seventeen bytes.."}}}).Bytes()
	require.ErrorIs(t, err, ErrTable)
	_, err = (&Table{Partitions: make([]Partition, 100)}).Bytes()
	require.ErrorIs(t, err, ErrTable)
	_, err = (&Table{Partitions: []Partition{{Subtype: SubtypeOTA0 + 1}}}).Apps()
	require.ErrorIs(t, err, ErrTable)
}

// image returns an application image.
func image(chip Chip, hashed bool, segments ...[]byte) []byte {
	b := make([]byte, headerSize)
	b[0], b[1] = 0xe9, byte(len(segments))
	binary.LittleEndian.PutUint32(b[4:], 0x40080000)
	binary.LittleEndian.PutUint16(b[12:], uint16(chip))
	xor := byte(0xef)
	for i, s := range segments {
		b = binary.LittleEndian.AppendUint32(b, uint32(0x3f400000+i<<16))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
		for _, c := range s {
			xor ^= c
		}
	}
	b = append(b, make([]byte, 15-len(b)%16)...)
	b = append(b, xor)
	if hashed {
		b[23] = 1
		sum := sha256.Sum256(b)
		b = append(b, sum[:]...)
	}
	return b
}

func app() []byte {
	b := make([]byte, 300)
	binary.LittleEndian.PutUint32(b, appMagic)
	binary.LittleEndian.PutUint32(b[4:], 7)
	copy(b[16:], "1.2.3")
	copy(b[48:], "demo")
	copy(b[80:], "12:00:00")
	copy(b[96:], "Jan  1 2026")
	copy(b[112:], "v5.3")
	b[144] = 0xaa
	return b
}

func TestVerifyImage(t *testing.T) {
	ctx := t.Context()
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, hashed := range []bool{false, true} {
		for n := 0; n < 9000; n += 1496 {
			seg := make([]byte, n)
			for i := range seg {
				seg[i] = byte(rnd.Uint32())
			}
			raw := image(ESP32C3, hashed, app(), seg)
			img, err := VerifyImage(ctx, bytes.NewReader(append(bytes.Clone(raw), "signature"...)), int64(len(raw))+9)
			require.NoError(t, err)
			require.Equal(t, int64(len(raw)), img.Size)
			require.Equal(t, ESP32C3, img.Chip)
			require.Equal(t, []Segment{{0x3f400000, 32, 300}, {0x3f410000, 340, uint32(n)}}, img.Segments)
			require.Equal(t, hashed, img.SHA256 != nil)
			require.Equal(t, &App{SecureVersion: 7, Version: "1.2.3", Project: "demo", Time: "12:00:00", Date: "Jan  1 2026", IDF: "v5.3", ELFSHA256: [32]byte{0xaa}}, img.App)
			for range 50 {
				bad := bytes.Clone(raw)
				i := headerSize + rnd.IntN(len(bad)-headerSize)
				bad[i] ^= 1 << rnd.IntN(8)
				_, err := VerifyImage(ctx, bytes.NewReader(bad), int64(len(bad)))
				if err == nil && !hashed {
					// The checksum covers neither addresses nor the filling.
					continue
				}
				require.ErrorIs(t, err, ErrImage, "byte %d", i)
				_, err = VerifyImage(ctx, bytes.NewReader(raw), int64(rnd.IntN(len(raw))))
				require.ErrorIs(t, err, ErrImage)
			}
		}
	}
	for _, bad := range [][]byte{image(ESP32, true), image(ESP32, true, make([]byte, 3)), image(ESP32, true, make([][]byte, 17)...), make([]byte, 64)} {
		_, err := VerifyImage(ctx, bytes.NewReader(bad), int64(len(bad)))
		require.ErrorIs(t, err, ErrImage)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err := VerifyImage(ended, bytes.NewReader(nil), 1)
	require.ErrorIs(t, err, context.Canceled)
	_, err = VerifyImage(ctx, failing{}, 100)
	require.ErrorIs(t, err, errRead)
}

var errRead = errors.New("read")

type failing struct{ io.Reader }

func (failing) ReadAt([]byte, int64) (int, error) { return 0, errRead }

func FuzzTable(f *testing.F) {
	f.Add(read(f, "parts.bin"))
	f.Fuzz(func(t *testing.T, b []byte) {
		tab, err := ParseTable(b)
		if err != nil {
			require.ErrorIs(t, err, ErrTable)
			return
		}
		again, err := tab.Bytes()
		require.NoError(t, err)
		back, err := ParseTable(again)
		require.NoError(t, err)
		require.Equal(t, tab, back)
	})
}

func FuzzImage(f *testing.F) {
	f.Add(image(ESP32, true, app(), []byte("abcd")))
	f.Add(image(ESP32, false, app()))
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := VerifyImage(t.Context(), bytes.NewReader(b), int64(len(b)))
		if err != nil {
			require.ErrorIs(t, err, ErrImage)
			return
		}
		require.LessOrEqual(t, img.Size, int64(len(b)))
	})
}

func FuzzOTAData(f *testing.F) {
	f.Add(NewEntry(1, StateValid).Bytes(), NewEntry(2, StateNew).Bytes())
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if len(a) < EntrySize || len(b) < EntrySize {
			return
		}
		raw := bytes.Repeat([]byte{0xff}, 0x2000)
		copy(raw, a[:EntrySize])
		copy(raw[0x1000:], b[:EntrySize])
		d, _ := open(t, raw, Config{})
		c, err := d.Read(t.Context())
		if err != nil {
			require.True(t, errors.Is(err, ota.ErrBadBootState) || errors.Is(err, ota.ErrNoBootState))
		}
		want := driver.Choice{Active: 1 - max(c.Active, 0), Trial: true, Revert: max(c.Active, 0), Tries: 1}
		if err := d.Write(t.Context(), want); err != nil {
			require.ErrorIs(t, err, ota.ErrBadBootState)
			return
		}
		c, err = d.Read(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, c)
	})
}

func Example() {
	chip := memflash.New(memflash.Config{Size: 4 << 20, EraseSize: 0x1000})
	table := &Table{Partitions: []Partition{
		{Type: TypeData, Subtype: SubtypeOTAData, Offset: 0xd000, Size: 0x2000, Label: "otadata"},
		{Type: TypeApp, Subtype: SubtypeOTA0, Offset: 0x10000, Size: 0x100000, Label: "ota_0"},
		{Type: TypeApp, Subtype: SubtypeOTA0 + 1, Offset: 0x110000, Size: 0x100000, Label: "ota_1"},
	}}
	p, _ := table.Find(TypeData, SubtypeOTAData)
	data, _ := Region(chip, p)
	apps, _ := table.Apps()
	d, err := New(&Config{OTAData: data, Apps: len(apps), Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	fmt.Println(d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}))
	slot, _ := boot(data, len(apps), true)
	fmt.Println("boots", slot)
	slot, _ = boot(data, len(apps), true)
	fmt.Println("not committed, boots", slot)
	// Output:
	// <nil>
	// boots 1
	// not committed, boots 0
}
