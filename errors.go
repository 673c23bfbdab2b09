package ota

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Sentinel errors. Every refusal and failure of this package wraps one of them,
// or an error of the Flash, Bootloader or Image it called; test with [errors.Is].
var (
	ErrBusy          = errors.New("another operation is in progress")
	ErrCommitted     = errors.New("the firmware is already committed")
	ErrNotCommitted  = errors.New("the firmware is not committed yet")
	ErrReverted      = errors.New("the firmware was reverted")
	ErrExpired       = errors.New("the commit timeout has expired")
	ErrRebootPending = errors.New("a reboot is pending")
	ErrWrongTrial    = errors.New("the commit names another trial")
	ErrNoRevert      = errors.New("there is no slot to revert to")

	ErrNoBootState    = errors.New("no boot state is stored yet")
	ErrBadBootState   = errors.New("the stored boot state is damaged beyond repair")
	ErrStateUnknown   = errors.New("the boot state could not be stored or read back")
	ErrNotBootable    = errors.New("no slot can be booted")
	ErrUnsupported    = errors.New("not supported on this device")
	ErrInvalid        = errors.New("invalid argument")
	ErrUnknownSlot    = errors.New("no such slot")
	ErrReadOnly       = errors.New("the slot is read-only")
	ErrNoTarget       = errors.New("no slot is free to be written")
	ErrUnverifiedSlot = errors.New("the slot holds no verified firmware")

	ErrTooLarge   = errors.New("too large")
	ErrTooSmall   = errors.New("shorter than declared")
	ErrIncomplete = errors.New("the image lacks a part that the slot needs")
	ErrDigest     = errors.New("digest mismatch")
	ErrVerify     = errors.New("read-back differs from what was written")
	ErrUnverified = errors.New("the image is not authenticated")
	ErrPlatform   = errors.New("the image is for another platform")
	ErrProduct    = errors.New("the image is for another product")
	ErrRollback   = errors.New("the security version is below the stored floor")
	ErrStep       = errors.New("the security version is too far above the stored floor")
	ErrHealth     = errors.New("a health check or first-boot hook failed")
	ErrChanged    = errors.New("the source changed while it was copied")
)

// Error says which operation failed, and where. Slot is NoSlot, Part is empty
// and Off is negative when they do not apply. Err is never nil.
type Error struct {
	Op   string // "update", "commit", "revert", "snapshot", …
	Slot SlotID // slot concerned, or NoSlot
	Part string // part concerned, or ""
	Off  int64  // byte offset inside the part, or -1
	Err  error
}

// Error formats e on one line; outside strings are quoted and cut.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("ota: ")
	if e.Op != "" {
		b.WriteString(e.Op + ": ")
	}
	if e.Slot != NoSlot {
		b.WriteString("slot " + strconv.Itoa(int(e.Slot)) + ": ")
	}
	if e.Part != "" {
		b.WriteString("part " + Quote(e.Part) + ": ")
	}
	if e.Off >= 0 {
		b.WriteString("at byte " + strconv.FormatInt(e.Off, 10) + ": ")
	}
	b.WriteString(e.Err.Error())
	return b.String()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

// quoteMax bounds what an outside string may take up in a message, in bytes.
const quoteMax = 64

// Quote returns s as a quoted Go string of ASCII characters, cut to a length
// fit for logs and error messages. Use it for every string that comes from
// outside (names and versions in manifests, method names, URLs).
func Quote(s string) string {
	if len(s) > quoteMax {
		return strconv.QuoteToASCII(s[:quoteMax]) + "…"
	}
	return strconv.QuoteToASCII(s)
}

// opErr makes err an *Error of op and slot, keeping what a deeper one says.
func opErr(op string, slot SlotID, err error) error {
	if err == nil {
		return nil
	}
	e, ok := err.(*Error)
	if !ok {
		return &Error{Op: op, Slot: slot, Off: -1, Err: err}
	}
	c := *e
	if c.Slot == NoSlot {
		c.Slot = slot
	}
	if c.Op != "" && c.Op != op {
		c.Err = fmt.Errorf("%s: %w", c.Op, c.Err)
	}
	c.Op = op
	return &c
}
