package rpi

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/slotota/ota"
)

// ErrFormat says that a file is not an autoboot.txt that can be understood. It is
// wrapped with what and where.
var ErrFormat = errors.New("malformed autoboot.txt")

// MaxSize is how large autoboot.txt may be, in bytes.
const MaxSize = 512

// mark is how the comment begins that says whether a trial has begun; the firmware
// passes over it.
const mark = "#ota trial "

// Autoboot is the content of autoboot.txt, as far as it chooses a partition.
type Autoboot struct {
	// Partition is booted by default, 0 if the file does not say.
	Partition int
	// Tryboot is booted if the tryboot flag is set. It is Partition if the
	// file does not say otherwise.
	Tryboot int
	// AB is tryboot_a_b: partitions are switched, not configuration files.
	AB bool

	// trial is what follows the mark, "" if there is none.
	trial  string
	others []string // lines that say nothing of the above, with their filters
}

// ParseAutoboot reads autoboot.txt (raspberrypi/documentation,
// documentation/asciidoc/computers/config_txt/autoboot.adoc): lines "key=value",
// which count if the filter above, [all], [none] or [tryboot], passes; the last one
// wins. Errors wrap [ErrFormat].
func ParseAutoboot(b []byte) (*Autoboot, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("rpi: autoboot.txt of %d bytes, the firmware reads %d: %w", len(b), MaxSize, ErrFormat)
	}
	a := &Autoboot{}
	filter, kept := "[all]", "[all]"
	for n, line := range strings.Split(string(b), "\n") {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, mark); ok {
			a.trial = rest
			continue
		}
		if strings.HasPrefix(line, "[") {
			filter = strings.ToLower(line)
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		normal, try := filter == "[all]", filter == "[all]" || filter == "[tryboot]"
		switch {
		case line == "":
			continue
		case key == "boot_partition" && try:
			p, err := strconv.ParseUint(value, 0, 8)
			if err != nil {
				return nil, fmt.Errorf("rpi: autoboot.txt, line %d: boot_partition=%s: %w", n+1, ota.Quote(value), ErrFormat)
			}
			a.Tryboot = int(p)
			if normal {
				a.Partition = int(p)
			}
			continue
		case key == "tryboot_a_b" && try:
			a.AB = value == "1"
			continue
		}
		if filter != kept {
			a.others = append(a.others, filter)
			kept = filter
		}
		a.others = append(a.others, line)
	}
	return a, nil
}

// Bytes encodes a. Errors wrap [ota.ErrTooLarge] if there is too much else in the
// file.
func (a *Autoboot) Bytes() ([]byte, error) {
	lines := slices.Clone(a.others)
	if slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "[") }) || len(lines) == 0 {
		lines = append(lines, "[all]")
	}
	if a.AB {
		lines = append(lines, "tryboot_a_b=1")
	}
	lines = append(lines, fmt.Sprintf("boot_partition=%d", a.Partition))
	if a.Tryboot != a.Partition {
		lines = append(lines, "[tryboot]", fmt.Sprintf("boot_partition=%d", a.Tryboot))
	}
	if a.trial != "" {
		lines = append(lines, mark+a.trial)
	}
	b := []byte(strings.Join(lines, "\n") + "\n")
	if len(b) > MaxSize {
		return nil, fmt.Errorf("rpi: autoboot.txt of %d bytes, the firmware reads %d: %w", len(b), MaxSize, ota.ErrTooLarge)
	}
	return b, nil
}
