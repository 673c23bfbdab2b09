package rpcjson

import (
	"errors"
	"slices"
	"strings"

	"github.com/slotota/ota"
)

// reasons are the words that stand for errors in replies, and what the messages of
// devices that do not use them have in common.
var reasons = [...]struct {
	word  string
	err   error
	texts []string // in lower case
}{
	{"busy", ota.ErrBusy, []string{"in progress", "under way", "failed to init updater"}},
	{"reboot-pending", ota.ErrRebootPending, []string{"reboot is pending", "shutting down"}},
	{"not-committed", ota.ErrNotCommitted, []string{"not committed", "not been committed", "uncommitted"}},
	{"committed", ota.ErrCommitted, []string{"already committed"}},
	{"expired", ota.ErrExpired, []string{"timeout has expired"}},
	{"wrong-trial", ota.ErrWrongTrial, nil},
	{"rollback", ota.ErrRollback, []string{"security version is below"}},
	{"security-step", ota.ErrStep, []string{"security version is too far"}},
	{"unverified", ota.ErrUnverified, []string{"signature", "not authenticated", "not signed"}},
	{"digest", ota.ErrDigest, []string{"digest mismatch", "checksum", "invalid crc"}},
	{"platform", ota.ErrPlatform, []string{"another platform"}},
	{"product", ota.ErrProduct, []string{"another product", "wrong app name"}},
	{"too-large", ota.ErrTooLarge, nil},
	{"incomplete", ota.ErrIncomplete, nil},
	{"unverified-slot", ota.ErrUnverifiedSlot, nil},
	{"unknown-slot", ota.ErrUnknownSlot, nil},
	{"unsupported", ota.ErrUnsupported, nil},
	{"unauthenticated", ErrUnauthenticated, nil},
	{"forbidden", ErrForbidden, nil},
}

// reasonOf returns the word for err, "" if there is none.
func reasonOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.word
		}
	}
	return ""
}

// Is reports whether e says what target does: an error of package ota, or
// [ErrUnauthenticated] or [ErrForbidden]. It goes by Reason and Code, and by the
// messages of devices that give no reason.
func (e *Error) Is(target error) bool {
	switch {
	case target == ErrUnauthenticated && e.Code == 401, target == ErrForbidden && e.Code == 403, target == ota.ErrRebootPending && e.Code == 418:
		return true
	}
	for _, r := range reasons {
		if r.err != target {
			continue
		}
		if e.Reason != "" {
			return e.Reason == r.word
		}
		m := strings.ToLower(e.Message)
		return slices.ContainsFunc(r.texts, func(t string) bool { return strings.Contains(m, t) })
	}
	return false
}
