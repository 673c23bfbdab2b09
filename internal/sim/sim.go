// Package sim is a simulated device: slots and a boot record on one simulated
// chip, a boot stage, and images to be told apart. Tests, examples and tools use
// it.
package sim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
)

// Geometry describes the storage of a device.
type Geometry struct {
	Name   string
	Slots  int             // 0 means 2
	App    memflash.Config // of each slot
	FS     memflash.Config // likewise
	Record memflash.Config // of each copy
	Copies int             // 0 means 3
}

// Geometries are the storages that sweeps run on: small ones, so that a sweep
// over all operations is short.
func Geometries() []Geometry {
	return []Geometry{{
		Name:   "nor-4k",
		App:    memflash.Config{Size: 8 << 10, EraseSize: 4 << 10},
		FS:     memflash.Config{Size: 4 << 10, EraseSize: 4 << 10},
		Record: memflash.Config{Size: 4 << 10, EraseSize: 4 << 10},
	}, {
		Name:   "file-unsynced",
		App:    memflash.Config{Size: 6 << 10, Unsynced: true},
		FS:     memflash.Config{Size: 3 << 10, Unsynced: true},
		Record: memflash.Config{Size: 4 << 10, Unsynced: true},
	}, {
		Name:   "nor-mixed-page256-zero",
		App:    memflash.Config{EraseUnits: []int64{1 << 10, 1 << 10, 2 << 10, 4 << 10}, WriteSize: 256, ErasedZero: true},
		FS:     memflash.Config{Size: 3 << 10, EraseSize: 1 << 10, WriteSize: 256, ErasedZero: true},
		Record: memflash.Config{Size: 4 << 10, EraseSize: 4 << 10, WriteSize: 256, ErasedZero: true},
	}, {
		Name:   "nand-192k-page3072",
		App:    memflash.Config{Size: 12 << 10, EraseSize: 6 << 10, WriteSize: 3 << 10},
		FS:     memflash.Config{Size: 9 << 10, EraseSize: 6 << 10, WriteSize: 3 << 10}, // last unit short
		Record: memflash.Config{Size: 192 << 10, EraseSize: 192 << 10, WriteSize: 3 << 10},
	}, {
		Name:   "nor-unit8-unsynced",
		App:    memflash.Config{Size: 6 << 10, EraseSize: 2 << 10, WriteSize: 8, Unsynced: true},
		FS:     memflash.Config{Size: 4 << 10, EraseSize: 2 << 10, WriteSize: 8, Unsynced: true},
		Record: memflash.Config{Size: 4 << 10, EraseSize: 4 << 10, WriteSize: 8, Unsynced: true},
	}, {
		Name:   "file",
		App:    memflash.Config{Size: 6 << 10},
		FS:     memflash.Config{Size: 3 << 10},
		Record: memflash.Config{Size: 4 << 10},
	}}
}

// Device is a simulated device. Its methods are not safe for concurrent use.
type Device struct {
	Chip   *memflash.Chip
	Slots  []ota.Slot
	Record *bootrecord.Record
	// Running is the slot that the boot stage handed over to.
	Running ota.SlotID

	g Geometry
}

// New returns a device whose slot 0 holds the factory image, version 1, and
// whose boot record was never written.
func New(g Geometry) (*Device, error) {
	if g.Slots == 0 {
		g.Slots = 2
	}
	if g.Copies == 0 {
		g.Copies = 3
	}
	var cfgs []memflash.Config
	for range g.Slots {
		cfgs = append(cfgs, g.App, g.FS)
	}
	for range g.Copies {
		cfgs = append(cfgs, g.Record)
	}
	d, err := attach(g, memflash.NewChip(cfgs...))
	if err != nil {
		return nil, err
	}
	// The factory fills whole parts.
	for i, p := range d.Slots[0].Parts {
		if err := d.Chip.Poke(i, factoryPart(p), 0); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// factoryPart returns what the factory put into part p of slot 0.
func factoryPart(p ota.Part) []byte {
	b := bytes.Repeat([]byte{ota.ErasedByte(p.Flash)}, int(p.Flash.Size()))
	copy(b, Content(1, p.Name))
	return b
}

// attach builds the device on a chip.
func attach(g Geometry, chip *memflash.Chip) (*Device, error) {
	d := &Device{Chip: chip, g: g}
	fs := chip.Flashes()
	for i := range g.Slots {
		d.Slots = append(d.Slots, ota.Slot{Parts: []ota.Part{
			{Name: "app", Flash: fs[2*i]},
			{Name: "fs", Flash: fs[2*i+1]},
		}})
	}
	return d, d.Restart()
}

// Clone returns a copy of d, as it is between two boots.
func (d *Device) Clone() (*Device, error) { return attach(d.g, d.Chip.Clone()) }

// Restart forgets everything that is not on the chip, as a reset does, and
// restores the power.
func (d *Device) Restart() (err error) {
	d.Chip.PowerOn()
	d.Running = ota.NoSlot
	d.Record, err = bootrecord.New(d.Chip.Flashes()[2*d.g.Slots:], &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return d.Running, nil },
	})
	return err
}

// Boot restarts the device, runs the boot stage, and opens what it hands over
// to.
func (d *Device) Boot(ctx context.Context, o *ota.Options) (*ota.Device, ota.Handover, error) {
	if err := d.Restart(); err != nil {
		return nil, ota.Handover{}, err
	}
	h, err := ota.Boot(ctx, d.Record, d.Slots, &ota.BootOptions{BufferSize: 1 << 10})
	if err != nil {
		return nil, h, err
	}
	d.Running = h.Slot
	dev, err := ota.Open(ctx, d.Record, d.Slots, o)
	return dev, h, err
}

// Versions is how many different images there are, numbered from 1, the factory
// image.
const Versions = 8

// Content returns the bytes of a part of image v, not to be changed. Images
// differ in every part, in length and content, as in everything else.
func Content(v int, part string) []byte { return contents()[part][v-1] }

var contents = sync.OnceValue(func() map[string][]([]byte) {
	m := map[string][]([]byte){}
	for v := 1; v <= Versions; v++ {
		for part, n := range map[string]int{"app": 2300 + 97*v, "fs": 1100 + 53*v} {
			b := make([]byte, n)
			rand.NewChaCha8(sha256.Sum256(fmt.Appendf(nil, "%s %d", part, v))).Read(b)
			m[part] = append(m[part], b)
		}
	}
	return m
})

// Identify returns which image slot id holds, complete to the last byte; 0 if
// none.
func (d *Device) Identify(id ota.SlotID) int {
	for v := 1; v <= Versions; v++ {
		if d.contains(id, v) {
			return v
		}
	}
	return 0
}

func (d *Device) contains(id ota.SlotID, v int) bool {
	for i, p := range d.Slots[id].Parts {
		want := Content(v, p.Name)
		got := make([]byte, len(want))
		if err := d.Chip.Peek(2*int(id)+i, got, 0); err != nil || !bytes.Equal(got, want) {
			return false
		}
	}
	return true
}

// Security returns the security version of image v.
func Security(v int) uint64 { return uint64(v) }

// Image is image v, to be installed.
type Image struct {
	V        int
	Unsigned bool
	Mutate   func(*ota.ImageInfo)                     // changes the description
	Wrap     func(part string, r io.Reader) io.Reader // changes the data
	next     int
}

// Info implements ota.Image.
func (m *Image) Info() ota.ImageInfo {
	info := ota.ImageInfo{
		Name: "demo", Platform: "sim",
		Version: fmt.Sprintf("%d.0", m.V), BuildID: fmt.Sprintf("2026%04d-000000", m.V),
		Security: Security(m.V),
		SignedBy: []string{"test"},
	}
	for _, name := range []string{"app", "fs"} {
		b := Content(m.V, name)
		sum := sha256.Sum256(b)
		info.Parts = append(info.Parts, ota.PartInfo{Name: name, Size: int64(len(b)), SHA256: &sum})
	}
	if m.Mutate != nil {
		m.Mutate(&info)
	}
	return info
}

// Next implements ota.Image.
func (m *Image) Next(ctx context.Context) (*ota.ImagePart, error) {
	info := m.Info()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if m.next >= len(info.Parts) {
		return nil, io.EOF
	}
	p := info.Parts[m.next]
	m.next++
	var data io.Reader = bytes.NewReader(Content(m.V, p.Name))
	if m.Wrap != nil {
		data = m.Wrap(p.Name, data)
	}
	return &ota.ImagePart{PartInfo: p, Data: data}, nil
}

// Seed returns a number that follows from its arguments and looks random.
func Seed(a ...int) uint64 {
	h := sha256.New()
	for _, v := range a {
		binary.Write(h, binary.LittleEndian, int64(v))
	}
	return binary.LittleEndian.Uint64(h.Sum(nil))
}
