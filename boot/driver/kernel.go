package driver

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/slotota/ota"
)

// Cmdline is where Linux shows its command line; proc_cmdline(5).
const Cmdline = "/proc/cmdline"

// RunningFromCmdline returns a Running function for kernels that are told on their
// command line which slot they come from: parameter key, such as "ota.slot" or
// "rauc.slot", has one of names, one for each slot. The file, "" for [Cmdline], is
// read at each call. The error wraps [ota.ErrUnknownSlot] if there is no such
// parameter or its value is none of names.
func RunningFromCmdline(file, key string, names []string) func(context.Context) (ota.SlotID, error) {
	return func(ctx context.Context) (ota.SlotID, error) {
		value, err := CmdlineParam(file, key)
		if err != nil {
			return ota.NoSlot, err
		}
		id := slices.Index(names, value)
		if id < 0 {
			return ota.NoSlot, fmt.Errorf("kernel parameter %s is %s: %w", key, ota.Quote(value), ota.ErrUnknownSlot)
		}
		return ota.SlotID(id), nil
	}
}

// CmdlineParam returns the value of a parameter of the running kernel, the last one
// if there are several. The error wraps [ota.ErrUnknownSlot] if there is none.
func CmdlineParam(file, key string) (value string, err error) {
	if file == "" {
		file = Cmdline
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	err = fmt.Errorf("no kernel parameter %s: %w", key, ota.ErrUnknownSlot)
	for _, word := range splitCmdline(string(b)) {
		if word == "--" {
			break // what follows is for init
		}
		if k, v, ok := strings.Cut(word, "="); ok && k == key {
			value, err = strings.Trim(v, `"`), nil
		}
	}
	return value, err
}

// splitCmdline splits at blanks outside of double quotes, as the kernel does
// (torvalds/linux, lib/cmdline.c, next_arg).
func splitCmdline(s string) []string {
	quoted := false
	return strings.FieldsFunc(s, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\t' || r == '\n' || r == 0)
	})
}
