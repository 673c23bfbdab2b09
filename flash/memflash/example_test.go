package memflash_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
)

// sum is inverted, because the CRC of four 0xFF is four 0xFF again: erased flash
// would be a valid record.
func sum(v []byte) uint32 { return ^crc32.ChecksumIEEE(v) }

// store keeps a number in two erase units, so that one of them is whole at any
// time.
func store(f ota.Flash, v uint32) error {
	for off := int64(0); off < f.Size(); off += 4096 {
		var rec [8]byte
		binary.LittleEndian.PutUint32(rec[:], v)
		binary.LittleEndian.PutUint32(rec[4:], sum(rec[:4]))
		if err := f.(ota.Eraser).Erase(off, 4096); err != nil {
			return err
		}
		if _, err := f.WriteAt(rec[:], off); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

func load(f ota.Flash) (uint32, error) {
	for off := int64(0); off < f.Size(); off += 4096 {
		var rec [8]byte
		if _, err := f.ReadAt(rec[:], off); err != nil {
			return 0, err
		}
		if v := binary.LittleEndian.Uint32(rec[:]); sum(rec[:4]) == binary.LittleEndian.Uint32(rec[4:]) {
			return v, nil
		}
	}
	return 0, errors.New("no valid record")
}

// A sweep cuts the power at every operation of a scenario, in every way, and
// looks at what is left.
func Example_sweep() {
	base := memflash.NewChip(memflash.Config{Size: 8192, EraseSize: 4096, WriteSize: 8})
	if err := store(base.Flashes()[0], 1); err != nil {
		fmt.Println(err)
		return
	}

	clean := base.Clone()
	if err := store(clean.Flashes()[0], 2); err != nil {
		fmt.Println(err)
		return
	}

	runs, bad := 0, 0
	for at := range clean.Ops() {
		for _, fault := range memflash.TearModes(uint64(at)) {
			chip := base.Clone()
			fault.At = at
			chip.Plan(fault)
			f := chip.Flashes()[0]
			if err := store(f, 2); !errors.Is(err, memflash.ErrPowerOff) {
				fmt.Println("not cut:", err)
			}
			chip.PowerOn()
			if v, err := load(f); err != nil || v != 1 && v != 2 {
				bad++
			}
			runs++
		}
	}
	fmt.Println(clean.Ops(), "operations,", runs, "runs,", bad, "bad")
	// Output: 6 operations, 48 runs, 0 bad
}

// New gives a flash for tests that need no faults.
func ExampleNew() {
	slot := ota.Part{Name: "app", Flash: memflash.New(memflash.Config{Size: 1 << 20})}
	nor := memflash.New(memflash.Config{Size: 1 << 20, EraseSize: 4096})

	_, erases := slot.Flash.(ota.Eraser)
	fmt.Println(slot.Flash.Size(), erases)
	_, err := nor.WriteAt([]byte("once"), 0)
	fmt.Println(err)
	_, err = nor.WriteAt([]byte("more"), 0)
	fmt.Println(err)
	// Output:
	// 1048576 false
	// <nil>
	// memflash: flash 0: write of 4 bytes at 0: not erased
}
