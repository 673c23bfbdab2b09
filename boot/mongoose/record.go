package mongoose

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/slotota/ota"
)

// Flags of a [Record].
const (
	Committed  = 1
	FirstBootA = 2 // for the firmware: this is its first boot
	FirstBootB = 4 // for the loader: this boot is allowed
	MergeFS    = 8 // the firmware takes over files of the old file system
)

// Flags of a [Slot].
const (
	SlotValid     = 1
	SlotWriteable = 2
)

// AppFSCreated is a flag of an [App].
const AppFSCreated = 1

// Dev is the name of a device, padded with zeros.
type Dev [8]byte

// String returns the name.
func (d Dev) String() string {
	s, _, _ := bytes.Cut(d[:], []byte{0})
	return string(s)
}

// App is what a slot holds.
type App struct {
	Len   uint32 // bytes
	Org   uint32 // address that it is linked for
	CRC32 uint32 // of Len bytes; IEEE
	Flags uint32
}

// Slot is an entry of a record.
type Slot struct {
	Flags      uint32
	AppDev     Dev
	AppMapAddr uint32 // where AppDev is in the address space; 0: it is not
	FSDev      Dev
	App        App
	ErrCount   uint8
}

const (
	// RecordSize is the number of bytes of a [Record].
	RecordSize = 256
	// MaxSlots is how many slots a record has room for.
	MaxSlots = 5

	recordMagic = 0x31534f4d // "MOS1"
	slotSize    = 41
	slotsOff    = 19
)

// Record is a boot record: struct mgos_boot_cfg, little-endian, packed.
type Record struct {
	Seq      uint32 // larger is newer
	Version  uint32 // 1
	NumSlots uint8
	Active   int8
	Revert   int8 // -1: none
	Flags    uint32
	Slots    [MaxSlots]Slot
	Reserved [28]byte // 0xff
}

// ParseRecord reads a record from the first RecordSize bytes of b, as the loader
// does: magic number and checksum must be right. Errors wrap [ErrRecord].
func ParseRecord(b []byte) (r Record, err error) {
	le := binary.LittleEndian
	switch {
	case len(b) < RecordSize:
		return r, fmt.Errorf("mongoose: record of %d bytes: %w", len(b), ErrRecord)
	case le.Uint32(b) != recordMagic:
		return r, fmt.Errorf("mongoose: magic number %#08x: %w", le.Uint32(b), ErrRecord)
	case le.Uint32(b[RecordSize-4:]) != crc32.ChecksumIEEE(b[:RecordSize-4]):
		return r, fmt.Errorf("mongoose: bad checksum: %w", ErrRecord)
	}
	r = Record{
		Seq: le.Uint32(b[4:]), Version: le.Uint32(b[8:]), NumSlots: b[12],
		Active: int8(b[13]), Revert: int8(b[14]), Flags: le.Uint32(b[15:]),
	}
	for i := range r.Slots {
		s := b[slotsOff+i*slotSize:]
		r.Slots[i] = Slot{
			Flags: le.Uint32(s), AppDev: Dev(s[4:12]), AppMapAddr: le.Uint32(s[12:]), FSDev: Dev(s[16:24]),
			App:      App{le.Uint32(s[24:]), le.Uint32(s[28:]), le.Uint32(s[32:]), le.Uint32(s[36:])},
			ErrCount: s[40],
		}
	}
	copy(r.Reserved[:], b[slotsOff+MaxSlots*slotSize:])
	return r, nil
}

// Bytes returns the RecordSize bytes of r, with their checksum.
func (r *Record) Bytes() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, RecordSize)
	b = le.AppendUint32(b, recordMagic)
	b = le.AppendUint32(b, r.Seq)
	b = le.AppendUint32(b, r.Version)
	b = append(b, r.NumSlots, byte(r.Active), byte(r.Revert))
	b = le.AppendUint32(b, r.Flags)
	for _, s := range r.Slots {
		b = le.AppendUint32(b, s.Flags)
		b = append(b, s.AppDev[:]...)
		b = le.AppendUint32(b, s.AppMapAddr)
		b = append(b, s.FSDev[:]...)
		for _, v := range []uint32{s.App.Len, s.App.Org, s.App.CRC32, s.App.Flags} {
			b = le.AppendUint32(b, v)
		}
		b = append(b, s.ErrCount)
	}
	b = append(b, r.Reserved[:]...)
	return le.AppendUint32(b, crc32.ChecksumIEEE(b))
}

// gist returns the record's own fields, for messages.
func (r *Record) gist() string {
	return fmt.Sprintf("%d slots, active %d, revert %d, flags %#x", r.NumSlots, r.Active, r.Revert, r.Flags)
}

// check reports what the loader cannot act on.
func (r *Record) check() error {
	switch {
	case r.Version != 1:
		return fmt.Errorf("mongoose: record of version %d: %w: %w", r.Version, ErrRecord, ota.ErrBadBootState)
	case r.NumSlots > MaxSlots || r.Active < 0 || r.Active >= int8(r.NumSlots) || r.Revert < -1 || r.Revert >= int8(r.NumSlots):
		return fmt.Errorf("mongoose: record of %s: %w: %w", r.gist(), ErrRecord, ota.ErrBadBootState)
	}
	return nil
}
