package mtdflash

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"sync"
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

// machine is a chip with five MTD partitions and the kernel's MTD layer: two parts
// of each of two slots, and the boot record, with a copy in each third of it.
type machine struct {
	chip *memflash.Chip
	devs []*kernel
}

const partitions = 5

// kernel is the MTD layer over a partition. Programming and erasing go through the
// simulated chip, which can be cut off at each of them.
type kernel struct {
	i     Info
	f     ota.Flash // data
	marks ota.Flash // a byte for each block: 0 if it is bad
	peek  func(flash int, p []byte, off int64)
	n     int // of f in the chip; marks are behind all data

	mu     sync.Mutex
	ecc    map[int64][]byte // what a page was programmed to, as its check bytes tell
	worn   map[int64]int    // how often a block can still be erased, where that is limited
	failed uint32
}

// strength is how many wrong bits of a page are corrected.
const strength = 1

func newMachine(t *testing.T, info Info, blocks [partitions]int64) *machine {
	var cfgs []memflash.Config
	for _, n := range blocks {
		cfgs = append(cfgs, memflash.Config{Size: n * info.EraseSize, EraseSize: info.EraseSize, WriteSize: info.WriteSize})
	}
	for _, n := range blocks {
		// A mark is there or it is not: what is in the spare area is repeated in the
		// kernel's two tables (torvalds/linux, drivers/mtd/nand/raw/nand_bbt.c).
		cfgs = append(cfgs, memflash.Config{Size: n})
	}
	m := (&machine{}).on(memflash.NewChip(cfgs...))
	for i, k := range m.devs {
		k.i = info
		k.i.Size = blocks[i] * info.EraseSize
	}
	require.NoError(t, m.chip.Err())
	return m
}

// on builds the machine on a chip.
func (m *machine) on(chip *memflash.Chip) *machine {
	c := &machine{chip: chip}
	fs := chip.Flashes()
	for i := range partitions {
		k := &kernel{f: fs[i], marks: fs[partitions+i], n: i, ecc: map[int64][]byte{}, worn: map[int64]int{},
			peek: func(flash int, p []byte, off int64) {
				if err := chip.Peek(flash, p, off); err != nil {
					panic(err)
				}
			}}
		if m.devs != nil {
			k.i, k.ecc, k.worn = m.devs[i].i, maps.Clone(m.devs[i].ecc), maps.Clone(m.devs[i].worn)
		}
		c.devs = append(c.devs, k)
	}
	return c
}

func (m *machine) Chip() *memflash.Chip { return m.chip }

func (m *machine) Clone() loadertest.Machine { return m.on(m.chip.Clone()) }

func (m *machine) Slot(flash int) ota.SlotID {
	if n := flash % partitions; n < 4 {
		return ota.SlotID(n / 2)
	}
	return ota.NoSlot
}

func (m *machine) Open() (slots []ota.Slot, record []ota.Flash, err error) {
	open := func(k *kernel, o Options) ota.Flash {
		f, oerr := newFlash(k, fmt.Sprint("mtd", k.n), &o)
		err = errors.Join(err, oerr)
		return f
	}
	for i := range 2 {
		slots = append(slots, ota.Slot{Parts: []ota.Part{
			{Name: "app", Flash: open(m.devs[2*i], Options{Size: 4 << 10})},
			{Name: "fs", Flash: open(m.devs[2*i+1], Options{Size: 3 << 10})},
		}})
	}
	third := m.devs[4].i.Size / 3
	for i := range int64(3) {
		record = append(record, open(m.devs[4], Options{Offset: i * third, Length: third, Size: bootrecord.MaxSize}))
	}
	return slots, record, err
}

func (k *kernel) page(off int64) []byte {
	b := make([]byte, k.i.WriteSize)
	k.peek(k.n, b, off)
	return b
}

func blank(b []byte) bool { return bytes.Count(b, []byte{0xff}) == len(b) }

func (k *kernel) ReadAt(p []byte, off int64) (int, error) {
	if !k.i.Kind.nand() {
		return k.f.ReadAt(p, off)
	}
	ws := k.i.WriteSize
	start := off - off%ws
	b := make([]byte, roundUp(off+int64(len(p)), ws)-start)
	if _, err := k.f.ReadAt(b, start); err != nil {
		return 0, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := int64(0); i < int64(len(b)); i += ws {
		want := k.ecc[start+i]
		if want == nil {
			want = bytes.Repeat([]byte{0xff}, int(ws))
		}
		wrong := 0
		for j, v := range want {
			wrong += bits.OnesCount8(v ^ b[i+int64(j)])
		}
		switch {
		case wrong > strength:
			k.failed++
		case wrong > 0:
			copy(b[i:], want)
		}
	}
	return copy(p, b[off-start:]), nil
}

// eio is what the chip's failures are to a program.
func eio(err error) error {
	if errors.Is(err, memflash.ErrFault) {
		return errors.Join(errIO, err)
	}
	return err
}

func (k *kernel) WriteAt(p []byte, off int64) (int, error) {
	if bad, _ := k.isBad(off - off%k.i.EraseSize); bad {
		return 0, fmt.Errorf("%w: write at %d to a bad block", crashtest.ErrViolation, off)
	}
	ws := k.i.WriteSize
	if k.i.Kind.nand() {
		k.mu.Lock()
		for i := int64(0); i < int64(len(p)); i += ws {
			k.ecc[off+i] = bytes.Clone(p[i : i+ws])
		}
		k.mu.Unlock()
	}
	n, err := k.f.WriteAt(p, off)
	if err != nil {
		k.settle(off, int64(len(p)))
	}
	return n, eio(err)
}

// settle forgets the check bytes of pages that are blank: they are blank, too.
func (k *kernel) settle(off, n int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for at := off; at < off+n; at += k.i.WriteSize {
		if k.ecc[at] != nil && blank(k.page(at)) {
			delete(k.ecc, at)
		}
	}
}

func (k *kernel) erase(off, n int64) error {
	if bad, _ := k.isBad(off); bad || !k.lasts(off) {
		return errIO
	}
	err := k.f.(ota.Eraser).Erase(off, n)
	k.settle(off, n)
	return eio(err)
}

func (k *kernel) lasts(off int64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	left, limited := k.worn[off]
	if limited {
		k.worn[off] = max(0, left-1)
	}
	return !limited || left > 0
}

func (k *kernel) isBad(off int64) (bool, error) {
	b := make([]byte, 1)
	k.peek(partitions+k.n, b, off/k.i.EraseSize)
	return b[0] != 0, nil
}

func (k *kernel) markBad(off int64) error {
	_, err := k.marks.WriteAt([]byte{1}, off/k.i.EraseSize)
	return err
}

func (k *kernel) failures() (uint32, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.failed, nil
}

func (k *kernel) info() (Info, error)                 { return k.i, nil }
func (k *kernel) isLocked(int64, int64) (bool, error) { return false, errNotSupported }
func (k *kernel) lock(int64, int64, bool) error       { return errNotSupported }
func (k *kernel) close() error                        { return nil }

// failing are operations that fail once: a page that cannot be programmed, a block
// that cannot be erased.
func failing(seed uint64) []memflash.Fault {
	return []memflash.Fault{{Kind: memflash.Fail, On: memflash.OpWrite, Seed: seed}, {Kind: memflash.Fail, On: memflash.OpErase, Seed: seed}}
}

// TestPowerCuts: devices whose slots and whose boot record are MTD partitions, cut off
// at every operation of the chip.
func TestPowerCuts(t *testing.T) {
	nand := Info{Kind: NAND, EraseSize: 1024, WriteSize: 256, Writable: true}
	nor := Info{Kind: NOR, EraseSize: 1024, WriteSize: 1, Writable: true}
	// Bad from the factory, and bad soon: in both slots, and in copies of the record.
	worn := newMachine(t, nand, [partitions]int64{9, 7, 9, 7, 3 * 8})
	for _, at := range [][2]int64{{0, 0}, {1, 3}, {2, 6}, {3, 0}, {4, 1}, {4, 17}} {
		require.NoError(t, worn.devs[at[0]].markBad(at[1]*nand.EraseSize))
	}
	for _, at := range [][3]int64{{0, 1, 1}, {1, 1, 1}, {2, 2, 1}, {2, 3, 2}, {3, 1, 1}, {4, 2, 4}, {4, 8, 5}, {4, 19, 6}} {
		worn.devs[at[0]].worn[at[1]*nand.EraseSize] = int(at[2])
	}
	both := func(seed uint64) []memflash.Fault { return slices.Concat(memflash.TearModes(seed), failing(seed)) }
	for _, tc := range []struct {
		name string
		m    *machine
	}{{"nor", newMachine(t, nor, [partitions]int64{4, 3, 4, 3, 3 * 4})}, {"nand", worn}} {
		t.Run(tc.name, func(t *testing.T) {
			loadertest.Storage(t, tc.name, tc.m, both, *long, *replay)
		})
	}
}
