package espidf

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/slotota/ota"
)

// State is the state of an [Entry]: esp_ota_img_states_t.
type State uint32

// The states.
const (
	StateNew       State = 0          // to be tried at the next boot
	StatePending   State = 1          // was started and has not been confirmed
	StateValid     State = 2          // confirmed
	StateInvalid   State = 3          // found to be bad by the firmware itself
	StateAborted   State = 4          // given up by the loader
	StateUndefined State = 0xffffffff // confirmed, written without rollback support
)

// String returns the name of the state.
func (s State) String() string {
	switch s {
	case StateNew:
		return "new"
	case StatePending:
		return "pending verify"
	case StateValid:
		return "valid"
	case StateInvalid:
		return "invalid"
	case StateAborted:
		return "aborted"
	case StateUndefined:
		return "undefined"
	}
	return fmt.Sprintf("unknown (%#x)", uint32(s))
}

// committed reports whether firmware in this state is not on trial.
func (s State) committed() bool { return s == StateValid || s == StateUndefined }

// EntrySize is the number of bytes of an [Entry].
const EntrySize = 32

// noSeq is the sequence number of erased flash.
const noSeq = 0xffffffff

// Entry is what one sector of otadata starts with: esp_ota_select_entry_t, all
// numbers little-endian.
type Entry struct {
	Seq   uint32   // offset 0; selects the slot, the larger one wins
	Label [20]byte // offset 4; not used, 0xff
	State State    // offset 24
	CRC   uint32   // offset 28; of Seq only
}

// NewEntry returns an entry with its checksum.
func NewEntry(seq uint32, s State) Entry {
	e := Entry{Seq: seq, State: s, CRC: seqCRC(seq)}
	for i := range e.Label {
		e.Label[i] = 0xff
	}
	return e
}

// ParseEntry reads an entry from the first EntrySize bytes of b. Whether it means
// anything is what [Entry.Sound] tells. The error wraps [ota.ErrTooSmall].
func ParseEntry(b []byte) (Entry, error) {
	if len(b) < EntrySize {
		return Entry{}, fmt.Errorf("espidf: otadata entry of %d bytes: %w", len(b), ota.ErrTooSmall)
	}
	e := Entry{
		Seq:   binary.LittleEndian.Uint32(b),
		State: State(binary.LittleEndian.Uint32(b[24:])),
		CRC:   binary.LittleEndian.Uint32(b[28:]),
	}
	copy(e.Label[:], b[4:24])
	return e, nil
}

// Bytes returns the EntrySize bytes of e.
func (e Entry) Bytes() []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, EntrySize), e.Seq)
	b = append(b, e.Label[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(e.State))
	return binary.LittleEndian.AppendUint32(b, e.CRC)
}

// Sound reports whether the checksum is right and the entry not blank.
func (e Entry) Sound() bool { return e.Seq != noSeq && e.CRC == seqCRC(e.Seq) }

// Bootable reports whether the loader may select the entry.
func (e Entry) Bootable() bool {
	return e.Sound() && e.State != StateInvalid && e.State != StateAborted
}

// Slot returns which of n OTA partitions the entry selects, -1 if n is less than 1.
func (e Entry) Slot(n int) int {
	if n < 1 || n > maxApps {
		return -1
	}
	return int((e.Seq - 1) % uint32(n))
}

// seqCRC is the checksum of a sequence number: crc32_le of the ROM, which inverts
// its start value.
func seqCRC(seq uint32) uint32 {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], seq)
	return crc32.Update(0xffffffff, crc32.IEEETable, b[:])
}
