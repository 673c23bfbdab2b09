package ubiflash

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/loadertest"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

// machine is a UBI device on a simulated chip: four volumes for the parts of two
// slots, and one with the copies of the boot record in its blocks.
//
// What UBI makes atomic is decided by one bit, as UBI decides it by one header: which
// of two places a block is in, and whether the update marker of a volume is set
// (torvalds/linux, drivers/mtd/ubi/eba.c, ubi_eba_atomic_leb_change; vtbl.c; upd.c).
type machine struct{ chip *memflash.Chip }

// The flashes of the chip.
const (
	parts   = 4 // volumes of the slots come first
	markers = parts
	blocks  = parts + 1 // two places for each block of the record
	places  = parts + 2 // which of the two counts
	copies  = 3
)

var sizes = [parts]int64{4 << 10, 3 << 10, 4 << 10, 3 << 10}

const lebSize = 1 << 10

func newMachine() *machine {
	var cfgs []memflash.Config
	for _, n := range sizes {
		cfgs = append(cfgs, memflash.Config{Size: n})
	}
	return &machine{memflash.NewChip(append(cfgs, memflash.Config{Size: parts}, memflash.Config{Size: 2 * copies * bootrecord.MaxSize}, memflash.Config{Size: copies})...)}
}

func (m *machine) Chip() *memflash.Chip      { return m.chip }
func (m *machine) Clone() loadertest.Machine { return &machine{m.chip.Clone()} }
func (m *machine) Slot(flash int) ota.SlotID {
	switch {
	case flash < parts:
		return ota.SlotID(flash / 2)
	}
	return ota.NoSlot
}

func (m *machine) Open() (slots []ota.Slot, record []ota.Flash, err error) {
	open := func(n int) ota.Flash {
		f, oerr := newFlash(&partVolume{m: m, n: n}, fmt.Sprint("ubi0_", n), &Options{})
		err = errors.Join(err, oerr)
		return f
	}
	for i := range 2 {
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: open(2 * i)}, {Name: "fs", Flash: open(2*i + 1)}}})
	}
	for i := range copies {
		l, oerr := newLEB(&stateVolume{m: m}, "ubi0_4", i, 0)
		err = errors.Join(err, oerr)
		record = append(record, l)
	}
	return slots, record, err
}

// bit returns a bit of the UBI device, set puts it there in one operation.
func (m *machine) bit(flash int, at int64) bool {
	b := make([]byte, 1)
	if err := m.chip.Peek(flash, b, at); err != nil {
		panic(err)
	}
	return b[0] != 0
}

func (m *machine) set(flash int, at int64, on bool) error {
	b := []byte{0}
	if on {
		b[0] = 1
	}
	_, err := m.chip.Flashes()[flash].WriteAt(b, at)
	return err
}

// partVolume is an open volume, part of a slot.
type partVolume struct {
	m    *machine
	n    int
	rest int64 // of the update under way
}

func (v *partVolume) info() (Info, error) {
	return Info{Name: fmt.Sprint(v.n), Size: sizes[v.n], LEBSize: lebSize, Interrupted: v.m.bit(markers, int64(v.n))}, nil
}

func (v *partVolume) ReadAt(p []byte, off int64) (int, error) {
	if v.m.bit(markers, int64(v.n)) {
		return 0, errBadVolume
	}
	return v.m.chip.Flashes()[v.n].ReadAt(p, off)
}

func (v *partVolume) update(n int64) error {
	if v.rest > 0 {
		return fmt.Errorf("busy: %w", crashtest.ErrViolation)
	}
	if err := v.m.set(markers, int64(v.n), true); err != nil {
		return err
	}
	v.rest = n
	f := v.m.chip.Flashes()[v.n]
	for off := int64(0); off < f.Size(); off += lebSize {
		if _, err := f.WriteAt(slices.Repeat([]byte{0xff}, lebSize), off); err != nil {
			return err
		}
	}
	return nil
}

func (v *partVolume) Write(p []byte) (int, error) {
	if v.rest == 0 {
		return 0, errors.New("operation not permitted")
	}
	p = p[:min(int64(len(p)), v.rest)]
	n, err := v.m.chip.Flashes()[v.n].WriteAt(p, sizes[v.n]-v.rest)
	if err != nil {
		return n, err
	}
	if v.rest -= int64(n); v.rest == 0 {
		return n, v.m.set(markers, int64(v.n), false)
	}
	return n, nil
}

func (v *partVolume) change(int32, int32) error { return ota.ErrUnsupported }
func (v *partVolume) reopen() error             { v.rest = 0; return nil }
func (v *partVolume) close() error              { return nil }

// stateVolume is an open volume whose blocks are changed one by one.
type stateVolume struct {
	m    *machine
	lnum int32
	want int32
}

func (v *stateVolume) info() (Info, error) {
	return Info{Name: "state", Size: copies * bootrecord.MaxSize, LEBSize: bootrecord.MaxSize}, nil
}

// place returns where a block is, and where it goes next.
func (v *stateVolume) place(lnum int64) (now, next int64) {
	now, next = 2*lnum*bootrecord.MaxSize, (2*lnum+1)*bootrecord.MaxSize
	if v.m.bit(places, lnum) {
		return next, now
	}
	return now, next
}

func (v *stateVolume) ReadAt(p []byte, off int64) (int, error) {
	lnum, in := off/bootrecord.MaxSize, off%bootrecord.MaxSize
	if in+int64(len(p)) > bootrecord.MaxSize {
		return 0, io.ErrUnexpectedEOF
	}
	now, _ := v.place(lnum)
	return v.m.chip.Flashes()[blocks].ReadAt(p, now+in)
}

func (v *stateVolume) change(lnum, n int32) error {
	if v.want > 0 {
		return fmt.Errorf("busy: %w", crashtest.ErrViolation)
	}
	v.lnum, v.want = lnum, n
	return nil
}

func (v *stateVolume) Write(p []byte) (int, error) {
	if int(v.want) != len(p) {
		return 0, errors.New("not in one write")
	}
	now, next := v.place(int64(v.lnum))
	n, err := v.m.chip.Flashes()[blocks].WriteAt(p, next)
	if err != nil {
		return n, err
	}
	v.want = 0
	return n, v.m.set(places, int64(v.lnum), next > now)
}

func (v *stateVolume) update(int64) error { return ota.ErrUnsupported }
func (v *stateVolume) reopen() error      { v.want = 0; return nil }
func (v *stateVolume) close() error       { return nil }

// TestPowerCuts: devices whose slots are volumes and whose boot record is in blocks of
// another one, cut off at every step of UBI.
func TestPowerCuts(t *testing.T) {
	both := func(seed uint64) []memflash.Fault {
		return append(memflash.TearModes(seed), memflash.Fault{Kind: memflash.Fail, On: memflash.OpWrite, Seed: seed})
	}
	m := newMachine()
	require.NoError(t, m.chip.Err())
	loadertest.Storage(t, "ubi", m, both, *long, *replay)
}
