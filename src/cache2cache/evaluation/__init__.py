"""Measuring what a fuser is worth: answers by likelihood and in words, controls, the clock, chats, reports."""
