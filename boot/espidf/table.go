package espidf

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/slotota/ota"
)

// Errors of this package, wrapped with what and where.
var (
	// ErrTable says that a partition table is malformed.
	ErrTable = errors.New("bad ESP-IDF partition table")
	// ErrImage says that an application image is malformed or damaged.
	ErrImage = errors.New("bad ESP-IDF application image")
)

// Types and subtypes of partitions (espressif/esp-idf,
// components/partition_table/gen_esp32part.py).
const (
	TypeApp  = 0x00
	TypeData = 0x01

	SubtypeFactory = 0x00 // of TypeApp
	SubtypeOTA0    = 0x10 // of TypeApp; ota_n is SubtypeOTA0+n, n at most 15
	SubtypeTest    = 0x20 // of TypeApp
	SubtypeOTAData = 0x00 // of TypeData
	SubtypeNVS     = 0x02 // of TypeData
)

// Flags of partitions.
const (
	FlagEncrypted = 1
	FlagReadOnly  = 2
)

// TableSize is how many bytes a partition table takes up in flash, TableOffset
// where it mostly is.
const (
	TableSize   = 0xc00
	TableOffset = 0x8000
)

// Partition is an entry of a partition table.
type Partition struct {
	Type, Subtype uint8
	Offset, Size  uint32 // bytes, from the start of the flash
	Label         string // at most 16 bytes
	Flags         uint32
}

// Table is a partition table: entries of 32 bytes, little-endian, an MD5 digest
// of them, and 0xff up to its end (espressif/esp-idf,
// components/bootloader_support/src/flash_partitions.c).
type Table struct {
	Partitions []Partition
	// NoMD5 says that the table has no digest, as those for old loaders.
	NoMD5 bool
}

const maxPartitions = TableSize/32 - 1

// ParseTable reads a partition table of at most [TableSize] bytes. Bytes behind
// it are ignored. Errors wrap [ErrTable].
func ParseTable(b []byte) (*Table, error) {
	t := &Table{NoMD5: true}
	bad := func(i int, format string, a ...any) error {
		return fmt.Errorf("espidf: partition table: entry %d: %s: %w", i, fmt.Sprintf(format, a...), ErrTable)
	}
	for i := 0; ; i++ {
		if i >= TableSize/32 || len(b) < (i+1)*32 {
			return nil, bad(i, "the table has no end")
		}
		e := b[i*32 : (i+1)*32]
		switch magic := binary.LittleEndian.Uint16(e); {
		case magic == 0x50aa && t.NoMD5:
			p := Partition{
				Type: e[2], Subtype: e[3],
				Offset: binary.LittleEndian.Uint32(e[4:]), Size: binary.LittleEndian.Uint32(e[8:]),
				Flags: binary.LittleEndian.Uint32(e[28:]),
			}
			label, rest, _ := bytes.Cut(e[12:28], []byte{0})
			if !filled(rest, 0) {
				return nil, bad(i, "bytes behind the label")
			}
			p.Label = string(label)
			if uint64(p.Offset)+uint64(p.Size) > 1<<32 {
				return nil, bad(i, "%s ends behind 4 GiB", ota.Quote(p.Label))
			}
			t.Partitions = append(t.Partitions, p)
		case magic == 0xebeb && t.NoMD5:
			if sum := md5.Sum(b[:i*32]); !bytes.Equal(e[16:], sum[:]) {
				return nil, bad(i, "the MD5 digest does not match")
			}
			t.NoMD5 = false
		case filled(e, 0xff):
			return t, t.check()
		default:
			return nil, bad(i, "magic number %#04x", magic)
		}
	}
}

// check reports partitions that overlap or cannot be.
func (t *Table) check() error {
	if len(t.Partitions) > maxPartitions {
		return fmt.Errorf("espidf: partition table: %d entries, at most %d: %w", len(t.Partitions), maxPartitions, ErrTable)
	}
	ps := slices.Clone(t.Partitions)
	slices.SortStableFunc(ps, func(a, b Partition) int {
		if a.Offset < b.Offset {
			return -1
		} else if a.Offset > b.Offset {
			return 1
		}
		return 0
	})
	end := uint64(0)
	for _, p := range ps {
		switch {
		case len(p.Label) > 16 || strings.Contains(p.Label, "\x00"):
			return fmt.Errorf("espidf: partition table: label %s: %w", ota.Quote(p.Label), ErrTable)
		case uint64(p.Offset) < end:
			return fmt.Errorf("espidf: partition table: %s overlaps another one: %w", ota.Quote(p.Label), ErrTable)
		}
		end = uint64(p.Offset) + uint64(p.Size)
	}
	return nil
}

// Bytes returns the TableSize bytes of the table. Errors wrap [ErrTable].
func (t *Table) Bytes() ([]byte, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	var b []byte
	for _, p := range t.Partitions {
		b = append(b, 0xaa, 0x50, p.Type, p.Subtype)
		b = binary.LittleEndian.AppendUint32(b, p.Offset)
		b = binary.LittleEndian.AppendUint32(b, p.Size)
		b = append(append(b, p.Label...), make([]byte, 16-len(p.Label))...)
		b = binary.LittleEndian.AppendUint32(b, p.Flags)
	}
	if !t.NoMD5 {
		sum := md5.Sum(b)
		b = append(append(b, 0xeb, 0xeb), bytes.Repeat([]byte{0xff}, 14)...)
		b = append(b, sum[:]...)
	}
	return append(b, bytes.Repeat([]byte{0xff}, TableSize-len(b))...), nil
}

// Find returns the first partition of that type and subtype, and whether there is
// one.
func (t *Table) Find(typ, subtype uint8) (Partition, bool) {
	for _, p := range t.Partitions {
		if p.Type == typ && p.Subtype == subtype {
			return p, true
		}
	}
	return Partition{}, false
}

// Apps returns the OTA partitions, ota_0 first. The error wraps [ErrTable] if their
// numbers have gaps: the loader could not select the last ones then.
func (t *Table) Apps() ([]Partition, error) {
	var apps []Partition
	n := 0
	for _, p := range t.Partitions {
		if p.Type == TypeApp && p.Subtype&^0xf == SubtypeOTA0 {
			n++
		}
	}
	for i := range n {
		p, ok := t.Find(TypeApp, uint8(SubtypeOTA0+i))
		if !ok {
			return nil, fmt.Errorf("espidf: partition table: %d OTA partitions, but no ota_%d: %w", n, i, ErrTable)
		}
		apps = append(apps, p)
	}
	return apps, nil
}

// Region returns the partition p of a flash chip.
func Region(chip ota.Flash, p Partition) (ota.Flash, error) {
	return ota.Region(chip, int64(p.Offset), int64(p.Size))
}
