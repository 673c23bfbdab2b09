package efibootguard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"time"
	"unicode/utf16"

	"github.com/slotota/ota"
)

// ErrFormat says that a file is not an environment. It is wrapped with what is
// wrong.
var ErrFormat = errors.New("not an EFI Boot Guard environment")

// State is the field ustate of an environment.
type State uint8

// The states. The loader makes Testing of Installed when it starts the slot, and
// Failed of Testing when it comes by again.
const (
	OK State = iota
	Installed
	Testing
	Failed
)

// String returns the word of bg_printenv.
func (s State) String() string {
	if int(s) < 4 {
		return [...]string{"OK", "INSTALLED", "TESTING", "FAILED"}[s]
	}
	return fmt.Sprintf("UNKNOWN (%d)", uint8(s))
}

// Where the fields are (efibootguard, include/envdata.h). Numbers are little-endian,
// strings UTF-16, ended by zero.
const (
	offKernel     = 0
	offArgs       = 510
	offInProgress = 1020
	offState      = 1021
	offWatchdog   = 1022
	offRevision   = 1024
	offUser       = 1028
	offSum        = offUser + 128<<10

	// Size is that of the file BGENV.DAT.
	Size = offSum + 4
	// MaxString is how many UTF-16 units the kernel's name and its arguments
	// may have.
	MaxString = 254
)

// Env is the content of a file BGENV.DAT. What it holds beside the fields, such as
// user variables, stays as it is.
type Env struct{ b []byte }

var le = binary.LittleEndian

// NewEnv returns an empty environment.
func NewEnv() *Env { return &Env{make([]byte, Size)} }

// ParseEnv decodes an environment. Errors wrap [ErrFormat].
func ParseEnv(b []byte) (*Env, error) {
	if len(b) != Size {
		return nil, fmt.Errorf("efibootguard: %d bytes instead of %d: %w", len(b), Size, ErrFormat)
	}
	if sum, want := crc32.ChecksumIEEE(b[:offSum]), le.Uint32(b[offSum:]); sum != want {
		return nil, fmt.Errorf("efibootguard: checksum %08x instead of %08x: %w", sum, want, ErrFormat)
	}
	return &Env{slices.Clone(b)}, nil
}

// Bytes encodes e.
func (e *Env) Bytes() []byte {
	b := slices.Clone(e.b)
	le.PutUint32(b[offSum:], crc32.ChecksumIEEE(b[:offSum]))
	return b
}

func (e *Env) string(off int) string {
	var u []uint16
	for i := range MaxString {
		c := le.Uint16(e.b[off+2*i:])
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}

func (e *Env) setString(off int, s string) error {
	if e.string(off) == s {
		return nil
	}
	u := utf16.Encode([]rune(s))
	if len(u) > MaxString || strings.Contains(s, "\x00") {
		return fmt.Errorf("efibootguard: %s has %d UTF-16 units, or a zero; %d are possible: %w", ota.Quote(s), len(u), MaxString, ota.ErrInvalid)
	}
	clear(e.b[off : off+2*MaxString+2])
	for i, c := range u {
		le.PutUint16(e.b[off+2*i:], c)
	}
	return nil
}

// Kernel is the program to start: "C:LABEL:file" on the config partition whose file
// EFILABEL holds LABEL in UTF-16, "L:LABEL:file" on the FAT partition of that label.
func (e *Env) Kernel() string { return e.string(offKernel) }

// SetKernel sets the program to start. Errors wrap [ota.ErrInvalid].
func (e *Env) SetKernel(s string) error { return e.setString(offKernel, s) }

// Args is the command line of the kernel.
func (e *Env) Args() string { return e.string(offArgs) }

// SetArgs sets the command line. Errors wrap [ota.ErrInvalid].
func (e *Env) SetArgs(s string) error { return e.setString(offArgs, s) }

// InProgress says that the slot is being written: the loader passes over it.
func (e *Env) InProgress() bool { return e.b[offInProgress] == 1 }

// SetInProgress sets what [Env.InProgress] returns.
func (e *Env) SetInProgress(on bool) {
	if on != e.InProgress() {
		e.b[offInProgress] = map[bool]byte{true: 1}[on]
	}
}

// State returns the state.
func (e *Env) State() State { return State(e.b[offState]) }

// SetState sets the state.
func (e *Env) SetState(s State) { e.b[offState] = byte(s) }

// Revision is the number that the loader prefers the slot by; 0 is never chosen.
func (e *Env) Revision() uint32 { return le.Uint32(e.b[offRevision:]) }

// SetRevision sets the revision.
func (e *Env) SetRevision(n uint32) { le.PutUint32(e.b[offRevision:], n) }

// Watchdog is the time after which the watchdog resets the machine if nobody takes it
// over; 0 if the loader arms none.
func (e *Env) Watchdog() time.Duration {
	return time.Duration(le.Uint16(e.b[offWatchdog:])) * time.Second
}

// SetWatchdog sets the timeout of the watchdog, in whole seconds, at most 65535.
// Errors wrap [ota.ErrInvalid].
func (e *Env) SetWatchdog(d time.Duration) error {
	if d < 0 || d > 0xffff*time.Second || d%time.Second != 0 {
		return fmt.Errorf("efibootguard: watchdog timeout %v: %w", d, ota.ErrInvalid)
	}
	le.PutUint16(e.b[offWatchdog:], uint16(d/time.Second))
	return nil
}

// onTrial reports whether the loader gives the slot one boot, or has.
func (e *Env) onTrial() bool { return e.State() == Installed || e.State() == Testing }

func (e *Env) clone() *Env { return &Env{slices.Clone(e.b)} }

func (e *Env) equal(f *Env) bool { return bytes.Equal(e.b[:offSum], f.b[:offSum]) }
